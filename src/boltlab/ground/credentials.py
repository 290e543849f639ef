"""Passwords, keys and tokens: a config names them, and never holds them.

What is in a config is written into the run folder, into every checkpoint and to the trackers. So a password is given as
`${oc.env:NAME}`: the reference is what is written, and what it stands for is read where an object is built. A config
that holds one itself is refused before anything is started. References to other variables (a folder, a host) are
resolved when the config is written, so that the run stands for itself.
"""

import fnmatch
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

# Uncommitted files of these names stay out of git.patch.
PRIVATE_FILES = [".env", ".env.*", "*.env", ".envrc", ".netrc", "_netrc", ".pgpass", ".pypirc", ".npmrc", ".htpasswd"]
PRIVATE_FILES += ["*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "*.ppk", "id_rsa*", "id_dsa*"]
PRIVATE_FILES += ["id_ecdsa*", "id_ed25519*", "*credentials*", "*secret*.*", "*secrets", "kaggle.json", "*.tfvars"]
PRIVATE_FILES += ["*.tfvars.json", "*.tfstate*", "*service*account*.json", ".git-credentials", ".my.cnf", "*.ovpn"]
PRIVATE_FILES += [".s3cfg", ".boto", ".dockercfg", "kubeconfig*", "*.kubeconfig", "application_default_*.json"]
_PRIVATE_PATHS = re.compile(
    r"(^|/)(\.(aws|ssh|gnupg|azure)/|\.kube/config|\.docker/config\.json|\.streamlit/secrets)", re.IGNORECASE
)
# … but for these, which hold none.
PUBLIC_FILES = (".env.example", ".env.sample", ".env.template", "*.pub", "*.py", "*.ipynb", "*.md", "*.sh")

# References and what is masked already are no secrets.
URL = re.compile(r"(?P<start>[A-Za-z][\w+.-]*://[^\s/@:'\"]*:)(?!\$\{oc\.env:|\*\*\*@)(?P<password>[^\s/@'\"]+)(?=@)")
# name=value or 'name': 'value' within a text: of a URL's query, a connection, a header, a command.
_PAIR = re.compile(
    r"""(?<![\w.-])(?P<name>[\w.-]{0,80}(?:pass\w*|pwd|secret|key|token|sig|signature|authorization))"""
    r"""(?P<is>["']?\s*[=:]\s*["']?(?:(?:basic|bearer)\s+)?)(?!\$\{oc\.env:|\*\*\*)(?P<value>[^\s&;,"'}]{3,})""",
    re.IGNORECASE,
)
_WORDS = "passw(or)?d|passphrase|pwd|secret|secret_?key|api_?key|access_?key|account_?key|private_?key|authorization"
_VARIABLE = re.compile(
    rf"(^|_)({_WORDS}|token|credentials?|webhook|dsn|connection_?string)(_id|_url)?($|_)|passw(or)?d$"
    "|_(key|pw|pass|auth|pat|cookie)$",
    re.IGNORECASE,
)
_KEY = re.compile(rf"(^|_)({_WORDS}|sig|signature)$|^((auth|access|api|bearer|hf|sas|refresh|session|github)_?)?token$")
# What may be a token by its form: a date is none.
_LONG = re.compile(r"(?<![\w-])(?!\d{4}-\d\d-\d\d)(?=[A-Za-z_-]*\d)[\w-]{16,}|[A-Za-z]{32}|PRIVATE KEY")
_REFERENCE = re.compile(r"\$\{oc\.env:\s*([^,}\s]+)")
_SHORTEST = 8  # characters of a variable's value that is looked for in a config


def is_secret_name(name: str) -> bool:
    """Whether a key of this name, `client_secret`, `api-key` or `clientSecret`, holds a secret; not `pad_token`."""
    last = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", re.sub(r"(\.\d+)+$", "", name).rpartition(".")[2])
    return bool(_KEY.search(last.replace("-", "_").lower()))


def masked(text: str) -> str:
    """The text with `***` for the password of each URL in it, the value behind each name of a secret, and each token
    that is known by its form."""
    text = URL.sub(lambda match: f"{match['start']}***", text)
    text = _PAIR.sub(lambda m: f"{m['name']}{m['is']}***" if is_secret_name(m["name"]) else m[0], text)
    if _LONG.search(text):
        from boltlab.ground import detect

        for token in detect.tokens(text):
            text = text.replace(token, "***")
    return text


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved config as plain values, as it may be written anywhere: a secret stands in it as its reference."""
    real: Any = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    if any(_REFERENCE.search(text) for _, text in _texts(OmegaConf.to_container(config))):
        return _chosen(real, with_references(config), "")
    return real


def mistakes(config: DictConfig) -> Iterator[tuple[str, str]]:
    """(key path with what is wrong masked, message) of each value that is a secret, or holds one."""
    try:
        values = dict(_texts(with_references(config)))
    except OmegaConfBaseException:  # listed by the check of the config
        values = dict(_texts(OmegaConf.to_container(config)))
    variables = {
        name: value
        for name, value in os.environ.items()
        if (_VARIABLE.search(name) or URL.search(value)) and len(value) >= _SHORTEST and not os.path.exists(value)
    }
    where = "would be written into the run folder, the checkpoints and the trackers"
    for key, text in values.items():
        found = next((name for name, value in variables.items() if value in text), None)
        cure = f"{where}: put it into an environment variable and give its name, '{key}=${{oc.env:NAME}}'"
        if found is not None:
            yield f"{key}=***", f"holds the value of {found}, which {where}: write '{key}=${{oc.env:{found}}}'"
        elif is_secret_name(key) and text and not _REFERENCE.search(text):
            yield f"{key}=***", f"is a secret by its name, which {cure}"
        elif (shown := masked(text)) != text:
            yield f"{key}={shown}", f"holds a password, a key or a token, which {cure}"


def forget_references(config: DictConfig, keys: Iterable[str]) -> None:
    """Sets to null, in place, what refers to the environment at these keys or below: it is about to be replaced."""
    under = tuple(f"{key}." for key in keys)
    for path, text in list(_texts(OmegaConf.to_container(config))):
        if _REFERENCE.search(text) and f"{path}.".startswith(under):
            OmegaConf.update(config, path, None)


def private(path: str) -> bool:
    """Whether a file is left out of git.patch because of its name."""
    name = path.rpartition("/")[2].lower()
    fits = [any(fnmatch.fnmatchcase(name, pattern) for pattern in names) for names in (PRIVATE_FILES, PUBLIC_FILES)]
    return (fits[0] and not fits[1]) or bool(_PRIVATE_PATHS.search(path))


def with_references(config: DictConfig) -> Any:
    """The resolved config as plain values; what refers to the environment stays a reference."""
    from omegaconf.resolvers import oc

    def keep(name: str, default: Any = "\0") -> Any:
        return default if default != "\0" and name not in os.environ else f"\0{{oc.env:{name}}}"

    def decode(text: Any, *, _parent_: Any, _node_: Any) -> Any:
        kept = isinstance(text, str) and "\0" in text
        return f"\0{{oc.decode:{text}}}" if kept else oc.decode(text, _parent_, _node_)

    OmegaConf.register_new_resolver("oc.env", keep, replace=True)
    OmegaConf.register_new_resolver("oc.decode", decode, replace=True)
    try:
        return _marked(OmegaConf.to_container(config, resolve=True, enum_to_str=True))
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
        OmegaConf.register_new_resolver("oc.decode", oc.decode, replace=True)


def _marked(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _marked(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_marked(value) for value in node]
    return node.replace("\0{", "${") if isinstance(node, str) else node


def _chosen(real: Any, kept: Any, key: str) -> Any:
    """The real values, but for those that are secret: of them the reference."""
    if isinstance(real, dict) and isinstance(kept, dict):
        return {name: _chosen(value, kept[name], str(name)) for name, value in real.items()}
    if isinstance(real, list) and isinstance(kept, list):
        return [_chosen(value, kept[i], key) for i, value in enumerate(real)]
    if real == kept or not isinstance(kept, str):
        return real
    secret = masked(str(real)) != str(real) or is_secret_name(key)
    return kept if secret or any(map(_VARIABLE.search, _REFERENCE.findall(kept))) else real


def _texts(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, str):
        yield path, node
    within = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in within:
        yield from _texts(value, f"{path}.{key}" if path else str(key))
