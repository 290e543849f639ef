# ruff: noqa: F401
"""Run folders: their files, their place, whether they are running, and what it takes to repeat them."""

from boltlab.ground.files import read_json, write_json, write_whole
from boltlab.runs.liveness import Status, job_states, lock, status
from boltlab.runs.lookup import find, folders, new_folder, newest_sweep, refuse_links, shown, started
from boltlab.runs.provenance import Git, ask_git, clone, commit_changes, environment, is_commit, packages
from boltlab.runs.record import (
    UNBEGUN,
    PlainLoader,
    config_text,
    end,
    load_config,
    parse_config,
    prepare,
    read_summary,
    reason,
    record_resume,
    record_start,
    recorded,
    refers_to_itself,
    sound,
    write_config,
    write_summary,
)
