"""`boltlab report`: runs side by side on one page that opens in a browser, without a network."""

from pathlib import Path

from boltlab import runs
from boltlab.config.compose import compose
from boltlab.config.overrides import split_overrides
from boltlab.ground.errors import UserError
from boltlab.runs import index as history
from boltlab.runs.filters import select


def main(overrides: list[str]) -> int:
    """Writes the page of the newest runs that fit the filters (`data=mnist`, `best_val_acc>0.99`, …).

    Raises:
        UserError: no run fits, or the page cannot be written.
    """
    own, filters = split_overrides("report", overrides)
    config = compose("report", own).config
    known = history.rows(config.log_dir, config.verb)
    chosen = select(known, filters)
    place = f"{config.log_dir}/{config.verb}"
    if not known:
        raise UserError(f"there is no run yet under {place}: train one with `boltlab train`, or give log_dir=…")
    if not chosen:
        raise UserError(f"none of the {len(known)} runs under {place} fits {' '.join(filters)}")
    shown = chosen[: config.limit]
    words = f"of those that fit {' '.join(filters)}" if filters else "all"
    selected = f"{place}: {len(shown)} of {len(known)} runs, {words}"
    if len(shown) < len(chosen):
        selected += f"; the newest of {len(chosen)} (limit={config.limit})"
    from boltlab.report.page import render

    text = render(shown, config.verb, selected)
    output = Path(config.output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        runs.write_whole(output, text)
    except OSError as e:
        raise UserError(f"output={output} cannot be written: {e.strerror or e}") from e
    print(f"{len(shown)} of {len(chosen)} runs  {output}  ({len(text.encode()) / 1000:,.0f} kB)")
    return 0
