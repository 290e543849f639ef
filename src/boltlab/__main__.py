"""`boltlab <verb> [overrides]`: finds the verb, and turns every mistake into a message and an exit code."""

import difflib
import importlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

# Verb → what it does, and what may follow it, for example.
VERBS = {
    "train": ("fit a model, then test its best checkpoint", "model=resnet18 data=cifar10 optimizer.lr=0.1"),
    "sweep": ("trainings whose values a sampler chooses, with pruning", "sweep=digits workers=2"),
    "eval": ("all metrics of a run on a split", "run=latest split=val"),
    "reproduce": ("train a run again and compare everything", "run=latest"),
    "predict": ("class and probabilities of image files, or a module's own predictions", "run=latest input=photos"),
    "show": ("a picture of what the model gets to see", "data=mnist augment=basic"),
    "runs": ("a table of the runs; diff, rm, archive, tag and note for some of them", "data=mnist 'best_val_acc>0.98'"),
    "report": ("runs side by side on one HTML page, with curves and mistakes", "data=digits"),
    "sync": ("upload W&B runs that were recorded offline, oldest first", "all dry_run=true"),
    "checkpoint": ("verify, show, export or convert a checkpoint file or a run's", "show latest"),
    "bench": ("what limits a configuration on this machine", "data=mnist model=lenet"),
    "doctor": ("check this machine and a data set", "data=image_folder data.root=photos"),
    "new": ("a project of your own, which has boltlab as a package", "../cells --package cells"),
}
# That of an optional feature is gone with it.
VERBS = {verb: said for verb, said in VERBS.items() if (Path(__file__).parent / "commands" / f"{verb}.py").is_file()}
# Waiting threads of torch's CPU kernels sleep instead of spinning: where other processes want the cores too, small nets
# train some 20 times as fast. It is read when torch is imported; the processes of a run inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_HYDRA_FLAGS = ("--cfg", "-c", "--info", "-i", "--resolve", "--package", "-p", "--hydra-help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns 0, 1 (failed), 2 (a mistake in the command or a config) or 128 + a signal."""
    arguments = [_at_home(text) for text in (sys.argv[1:] if argv is None else argv)]
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        _help()
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb == "--version":
        from boltlab import __version__

        print(f"boltlab {__version__}")
        return 0
    if verb in ("-sc", "--shell-completion"):
        return _complete(rest)
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f": did you mean {near[0]!r}?" if near else ";"
        print(f"boltlab: there is no verb {verb!r}{hint} verbs: {', '.join(VERBS)}", file=sys.stderr)
        return 2
    from boltlab.config import project
    from boltlab.processes.exits import exit_code, led

    # Words of its own. In runs, -word takes a tag away, and a note may begin with anything.
    marks = verb == "new" or (verb == "runs" and rest[:1] in (["tag"], ["note"]))

    def command() -> int:
        with project.options(verb, [] if marks else rest) as left:
            if "--help" in rest or "-h" in rest:
                _verb_help(verb)
                return 0
            return led(lambda: exit_code(verb, lambda: _run(verb, rest if marks else left, marks)))

    try:
        return exit_code(verb, command)
    except Exception:
        if argv is not None:
            raise
        import traceback

        from boltlab.ground.credentials import masked

        sys.stderr.write(masked(traceback.format_exc()))  # as Python does, but for the passwords of URLs
        return 1


def _at_home(argument: str) -> str:
    """The argument, each value that begins with ~ or ~user as the shell would have it, which looks at whole words."""
    return re.sub(r"(?<=[=\[,\"'])~[\w.-]*(?=[/,\]\"']|$)", lambda found: os.path.expanduser(found[0]), argument)


def _run(verb: str, rest: list[str], marks: bool) -> int:
    options = [] if marks else [a for a in rest if a.startswith("-")]
    sweep = {"-m", "--multirun"}.intersection(options)
    flags = [a for a in options if a not in sweep]
    if any(flag.partition("=")[0] in _HYDRA_FLAGS for flag in flags):
        from boltlab.commands import printed

        if not printed.main(verb, rest):
            _hydra(verb, rest)
        return 0
    if flags:
        print(f"boltlab {verb}: there is no option {flags[0]!r}; overrides are key=value", file=sys.stderr)
        return 2
    if sweep and verb != "train":
        print(f"boltlab {verb}: {min(sweep)} runs several trainings; only boltlab train takes it", file=sys.stderr)
        return 2
    module = importlib.import_module(f"boltlab.commands.{'grid' if sweep else verb}")
    return int(module.main([a for a in rest if a not in sweep]))


def _help() -> None:
    print("boltlab <verb> [key=value …]\n")
    for verb, (line, example) in VERBS.items():
        print(f"  {verb:<12}{line}\n{'':14}boltlab {verb} {example}")
    print("\nboltlab <verb> --help lists the keys, the groups and their choices.")
    print("boltlab train --cfg job prints the composed config; boltlab train -m a=1,2 b=3,4 runs a grid.")
    print("--config-dir DIR and --config-name NAME are Hydra's; trusted=[package] trusts classes of your own in a run.")
    print('Completion in bash: eval "$(boltlab -sc install=bash)"; also zsh (as bash) and fish.')


def _verb_help(verb: str) -> None:
    from boltlab.config.help import help_text

    line, example = VERBS[verb]
    text = f"boltlab {verb}: {line}\n\n  boltlab {verb} {example}"
    print(text if verb == "new" else f"{text}\n\n{help_text(verb)}")


def _hydra(verb: str, arguments: list[str]) -> None:
    """Hands what prints a config or completes a word to Hydra's own command line."""
    import hydra

    from boltlab.config import project
    from boltlab.config.sources import config_dirs, search_further

    search_further()
    sys.argv = ["boltlab", *arguments]
    name = project.config_name(verb)
    hydra.main(version_base="1.3", config_path=str(config_dirs()[0]), config_name=name)(lambda config: None)()


def _complete(rest: list[str]) -> int:
    """Shell completion: the verbs here, the overrides by Hydra with the verb taken out of the line."""
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    if rest and rest[0].startswith("query="):
        if len(words) < 2 or (len(words) == 2 and not line.endswith(" ")):
            print(" ".join(verb for verb in VERBS if verb.startswith(words[1] if len(words) == 2 else "")))
            return 0
        if words[1] not in VERBS:
            return 0
        start = line.index(words[1], len(words[0]))
        os.environ["COMP_LINE"] = line[:start] + line[start + len(words[1]) :].lstrip()
        point = int(os.environ.get("COMP_POINT", len(line)))
        os.environ["COMP_POINT"] = str(point - (len(line) - len(os.environ["COMP_LINE"])))
    _hydra(words[1] if len(words) > 1 and words[1] in VERBS else "train", ["-sc", *rest])
    return 0


def cli() -> NoReturn:
    """The program `boltlab`."""
    from boltlab.ground.output import keep_going
    from boltlab.processes.exits import leave

    keep_going(says_all=sys.argv[1:2] in (["train"], ["sweep"], ["reproduce"]))
    leave(main())


if __name__ == "__main__":
    cli()
