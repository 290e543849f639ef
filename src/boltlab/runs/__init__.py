"""Run folders: their files, their place, whether they are running, and what it takes to repeat them."""

from boltlab.ground.files import read_json, write_json, write_whole
from boltlab.runs.liveness import AT_WORK, COLOURS, job_states, lock, status
from boltlab.runs.lookup import find, folders, new_folder, refuse_links, shown, started
from boltlab.runs.provenance import Git, ask_git, clone, commit_changes, environment, has_file, packages
from boltlab.runs.record import (
    PlainLoader,
    end,
    load_config,
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

__all__ = [
    "AT_WORK",
    "COLOURS",
    "Git",
    "PlainLoader",
    "ask_git",
    "clone",
    "commit_changes",
    "end",
    "environment",
    "find",
    "folders",
    "has_file",
    "job_states",
    "load_config",
    "lock",
    "new_folder",
    "packages",
    "prepare",
    "read_json",
    "read_summary",
    "reason",
    "record_resume",
    "record_start",
    "recorded",
    "refers_to_itself",
    "refuse_links",
    "shown",
    "sound",
    "started",
    "status",
    "write_config",
    "write_json",
    "write_summary",
    "write_whole",
]
