"""`boltlab reproduce`: trains a run again, and says what differs: code, packages, machine, data, and what came out."""

import hashlib
import shlex
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from boltlab import runs
from boltlab.config.build import build
from boltlab.config.compose import Composed, compose
from boltlab.config.devices import process_count
from boltlab.config.edit import edit
from boltlab.config.effects import NO_EFFECT, PLACES_OF_DATA, under
from boltlab.config.overrides import keys, split_overrides
from boltlab.ground import signals
from boltlab.ground.errors import ConfigError, Mistake, UserError
from boltlab.ground.texts import line, print_table
from boltlab.runs import differences as differ
from boltlab.training import start as training

# What of a run's config may be another one. (Its length, though changeable on resume, would change the result.)
_HARMLESS = under(*NO_EFFECT, *PLACES_OF_DATA)


def main(overrides: list[str]) -> int:
    """Returns 0 if all is equal to the bit, or every metric to `digits`; 1 if not. Without a training: 0."""
    with signals.caught():
        return _main(overrides)


def _main(overrides: list[str]) -> int:
    git = runs.ask_git()
    own, for_run = split_overrides("reproduce", overrides)
    options = compose("reproduce", own).config
    refuse_changes(for_run)
    source = runs.find(options.run, options.log_dir)
    config, summary = runs.load_config(source, replaced=keys(for_run)), runs.read_summary(source)
    if "evaluated" in summary:
        raise UserError(f"{runs.shown(source)} is an evaluation, no training: give the run that it has evaluated")
    if options.compare is not None:
        return compare(source, runs.find(options.compare, options.log_dir, option="compare"), options.digits)
    reason = why_not(source, config, summary)
    if reason is not None and not options.dry_run:
        raise UserError(f"{runs.shown(source)} cannot be trained again to the same end: {reason}")
    config = for_now(config, for_run, options.log_dir)
    patch, now = git.result().patch, runs.environment(git.result())
    now["processes"] = process_count(config)
    print(f"then  {runs.shown(source)}\nnow   this machine, this clone", flush=True)
    show_code(source, options.log_dir, now, patch)
    data, problem = here(config, source, options.dry_run)
    others = show_rows(source, now, data)
    if problem:
        print(problem)
    for note in notes(source, config, summary):
        print(note)
    if options.dry_run:
        print(f"it would be refused: {reason}" if reason else "nothing was trained")
        return 0
    if others and not options.anyway:
        raise UserError(
            f"the data are not those of then ({'; '.join(others)}), nothing was trained: point data.root=…,"
            " data.data_dir=… or data.path=… at those, or train all the same with anyway=true"
        )
    known = {"experiment": summary.get("name"), **{key: summary.get(key) for key in ("data", "model")}}
    composed = Composed("train", config, overrides, known)
    folder = runs.new_folder(options.log_dir, "train", training.name_of(composed))
    runs.write_summary(folder, reproduces=str(source))
    print(flush=True)
    training.run(composed, folder, git)
    code = show_results(source, folder, options.digits)
    runs.write_summary(folder, reproduced=code == 0)
    return code


def refuse_changes(overrides: list[str]) -> None:
    """Raises ConfigError: with every override that could change what is trained."""
    mistakes = []
    for text in overrides:
        key = text.lstrip("+~").partition("=")[0]
        if not _HARMLESS.match(key) or key == "launcher":
            allowed = "logger, name, tags, data_dir, data.root, data.num_workers, trainer.enable_progress_bar, …"
            mistakes.append(Mistake(text, f"could change the result, so it is not the same run; free are {allowed}"))
    if mistakes:
        raise ConfigError(mistakes)


def why_not(folder: Path, config: DictConfig, summary: dict[str, Any]) -> str | None:
    """Why what a run has reached does not follow from its config alone; None where it does."""
    reason = _unfinished(folder, summary) or _resumed(summary) or _cut_short(config, summary)
    return reason or _other_weights(config, summary)


def _unfinished(folder: Path, summary: dict[str, Any]) -> str | None:
    status = runs.status(summary, folder)
    if status == "unknown":
        return "its summary.json is not there or broken, so how it ended is not known"
    cure = f": boltlab train resume={shlex.quote(str(runs.shown(folder)))}" if status.resumable else ""
    return None if status == "finished" else f"it is {status}, and has no end to be compared with{cure}"


def _resumed(summary: dict[str, Any]) -> str | None:
    for again in summary.get("resumed", []):
        given, changed = (
            found if isinstance(found := again.get(key), list) else [] for key in ("overrides", "changed")
        )
        keys = [str(text).lstrip("+~").partition("=")[0] for text in given]
        keys += [str(change[0]) for change in changed if isinstance(change, list) and change]
        for key in keys:
            if not _HARMLESS.match(key):
                return f"it was resumed with another {line(key)}, so no one config has made it"
    return None


def _cut_short(config: DictConfig, summary: dict[str, Any]) -> str | None:
    limits = config.trainer
    if limits.get("fast_dev_run"):
        return "trainer.fast_dev_run keeps nothing that could be compared"
    if limits.get("max_time") is None or any(limits.get(f"max_{n}") == summary.get(n) for n in ("epochs", "steps")):
        return None
    return f"trainer.max_time={limits.max_time} may have ended it, and that is the clock's"


def _other_weights(config: DictConfig, summary: dict[str, Any]) -> str | None:
    if not config.get("init_from"):
        return None
    path, known = Path(config.init_from), summary.get("init_from")
    if not path.is_file():
        return f"it began with the weights of {line(path)}, which is not there any more"
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if isinstance(known, dict) and known.get("sha256") not in (None, sha256):
        return f"it began with the weights of {line(path)}, which is another file now"
    return None


def for_now(config: DictConfig, overrides: list[str], log_dir: str) -> DictConfig:
    """The run's config for a training of now: as it was, with what cannot change the result on top."""
    moved = [text for text in overrides if text.startswith("data_dir=")]
    if moved:  # in a config that was resolved, what lay below it says so no longer
        before, after = str(config.get("data_dir", "data")), moved[-1].partition("=")[2].strip("'\"")
        for key in ("data_dir", "root", "path", "cache_dir"):
            value = config.data.get(key)
            if isinstance(value, str) and Path(value).is_relative_to(before):
                config.data[key] = str(Path(after) / Path(value).relative_to(before))
    began_with = config.get("init_from")
    config.update({"resume": None, "resume_changed": None, "log_dir": log_dir})
    config = edit(config, overrides, ("resume", "init_from"), settled=True)
    config.init_from = began_with
    return config


def here(config: DictConfig, source: Path, dry_run: bool) -> tuple[dict[str, Any], str]:
    """The fingerprints, as of now, of the splits that the run recorded; and a line where that cannot be had."""
    from boltlab.data.fingerprint import fingerprint

    recorded = runs.read_json(source / "data.json")
    splits = [split for split in ("train", "val", "test") if split in (recorded.get("splits") or {})]
    if not splits:
        return {}, "data          the run has recorded nothing of them: whether they are the same is not known"
    try:
        data = build(config, "data")
        if not dry_run:
            data.prepare_data()  # which may download
        contents = recorded.get("fingerprint") == "contents"
        return {"splits": {split: fingerprint(data, split, contents) for split in splits}}, ""  # type: ignore[arg-type]
    except UserError as e:
        if not dry_run:
            raise
        return {}, f"data          cannot be read here: {e}"


def notes(folder: Path, config: DictConfig, summary: dict[str, Any]) -> list[str]:
    """What else there is to know of how the run came about."""
    lines = []
    found = summary.get("found")
    if isinstance(found, dict) and found:
        values = ", ".join(f"{line(key)}={line(value)}" for key, value in found.items())
        lines.append(f"{values} was searched before the run, and is taken as it was found")
    if again := summary.get("resumed"):
        commits = {line(start.get("git_commit"), 40) for start in again}
        commits -= {line(runs.read_json(folder / "environment.json").get("git_commit"), 40)}
        lines.append(
            f"then it was resumed {len(again)} times, now it is trained at one go"
            + (f"; a part of it was trained by other code: {', '.join(sorted(commits))}" if commits else "")
        )
    if runs.read_json(folder / "environment.json").get("accelerators") and not config.trainer.get("deterministic"):
        lines.append("GPU kernels may add in any order: only trainer.deterministic=true gives equal bits there")
    return lines


# ---------------------------------------------------------------- what is shown


def show_code(source: Path, log_dir: str, now: dict[str, Any], patch: bytes) -> None:
    """Commits and uncommitted changes, and where they differ the commands that bring those of then back."""
    then = runs.read_json(source / "environment.json")
    before, kept = differ.patch_of(source), source / "git.patch"
    commits = [line(side.get("git_commit"), 64) for side in (then, now)]
    changed = differ.patches(before, patch)
    if not runs.is_commit(then.get("git_commit")):  # from anybody: it would stand in a command below
        wrong = "" if commits[0] == "None" else f": {commits[0]!r} is none"
        print(f"code          the run has recorded no commit{wrong}")
        return
    if commits[0] == commits[1] and not changed:
        print(f"code          equal: commit {commits[0][:12]}{', with the same uncommitted changes' * bool(before)}")
        return
    print(f"code          then commit {commits[0][:12]}{' with uncommitted changes' * bool(before)}", end="")
    print(f", now {commits[1][:12]}{' with uncommitted changes' * bool(patch)}")
    if commits[0] != commits[1]:
        print(f"              {runs.commit_changes(*commits) or 'this clone does not know that commit: git fetch'}")
    for file in changed:
        print(f"              {file}")
    top = runs.clone() or Path()
    in_top = "" if top.resolve() == Path.cwd().resolve() else f"-C {shlex.quote(str(top))} "
    there = Path("../repro") if not in_top else top.parent / "repro"
    print("to train with the code of then:")
    print(f"  git {in_top}worktree add ../repro {commits[0]}")
    if before:
        print(f"  git -C {shlex.quote(str(there))} apply {shlex.quote(str(kept))}")
    run, log_dir = shlex.quote(f"run={runs.shown(source)}"), shlex.quote(f"log_dir={log_dir}")
    print(f"  PYTHONPATH={shlex.quote(str(there / 'src'))} python -m boltlab reproduce {run} {log_dir}")


def show_rows(source: Path, now: dict[str, Any], data: dict[str, Any]) -> list[str]:
    """Machine, packages and data of then and now as a table; returns what makes the data others ones."""
    then = differ.surroundings(source)
    rows = differ.environments(then, now)
    of_data, others = differ.data(runs.read_json(source / "data.json"), data)
    if not then.get("packages"):
        print("environment   the run has recorded none")
    elif not rows:
        print("environment   equal: python, packages, machine")
    if rows or of_data:
        print_table(("", "then", "now"), [*rows, *of_data], pad_edge=False)
    return others


def compare(source: Path, other: Path, digits: int | None) -> int:
    """What differs between two runs that there are, in their settings, surroundings and results."""
    if source == other:
        raise UserError(f"{runs.shown(source)} cannot be compared with itself")
    differ.show_origins(source, other)
    return show_results(source, other, digits, ("a", "b"))


def show_results(source: Path, folder: Path, digits: int | None, sides: tuple[str, str] = ("then", "now")) -> int:
    """The table of what came out, and the exit code."""
    found = differ.results(source, folder)
    print()
    said = [(row.what, row.then, row.now, row.verdict) for row in found]
    print_table(("", *sides, ""), said, pad_edge=False)
    for row in found:
        if row.detail:
            print(f"{row.what}: {row.detail}")
    judged = [row for row in found if row.metric or digits is None]
    if not judged:
        raise UserError(f"{runs.shown(source)} has kept no metric and no weights: nothing can be compared")
    wanted = float("inf") if digits is None else digits
    worse = [row for row in judged if row.digits is None or row.digits < wanted]
    wish = differ.verdict(wanted)
    print(f"{len(worse)} of {len(judged)} are not {wish}" if worse else f"reproduced: all {len(judged)} are {wish}")
    return int(bool(worse))
