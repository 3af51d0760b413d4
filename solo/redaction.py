"""Keeps secrets of a config out of what a run writes and says: ``config.json``, ``results.json``, checkpoints, errors."""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "(hidden)"
_OPENING = "access|account|api|auth|client|comet|deploy|encryption|hf|hub|master|mlflow|private|signing|ssh|storage|wandb"
_KEYS = f"secret|passw|credential|authorization|({_OPENING})[-_.]?key"
_OF_MODELS = ("class", "cls", "dist", "mask", "num", "pad", "pos", "prompt", "reg", "register")     # tokens of theirs
_TOKEN = "".join(f"(?<!{word}_)" for word in _OF_MODELS) + "tokens?(?![-_]?[a-z])"
_SECRET = re.compile(f"token|{_KEYS}", re.IGNORECASE)
_SECRET_OF_A_MODEL = re.compile(f"{_TOKEN}|{_KEYS}", re.IGNORECASE)
_A_MODELS = re.compile(r"(^|\.)(backbone\.kwargs|method_kwargs)\.")
_SECRET_NUMBER = re.compile(rf"(^|\.|(access|api|auth|hf|hub)_?)token$|{_KEYS}", re.IGNORECASE)    # others count, or switch
_IN_TEXT = re.compile(          # https://user:password@host, https://token@host; ...?token=...; Authorization: Bearer ...
    rf"""(?ix)
    (:/{{1,2}}) (?: [^/\s]+ | [^/\s:@]+ : (?!\d*/) \S* ) (?=@)
    | ([?&;\#] (?: key | sig | auth | [\w.-]* (?: token | signature | {_KEYS} ) [\w.-]* ) =) [^&;\#\s"']+
    | (\b authorization ["']? \s*[:=]\s* ["']? (?: (?: basic | bearer | digest | token ) \s+ )?) [^\s"',;]+
    | (\b bearer \s+) [^\s"',;]{{12,}}
    """
)
_SHORT = 4                              # characters; a shorter text is in too many others to be looked for inside them
_from_environment: dict[str, str] = {}  # value -> how the config names it


def remember(value: str, variable: str) -> None:
    """This text came out of an environment variable: records shall name the variable."""
    if value:
        _from_environment[value] = "${oc.env:" + variable + "}"


def redacted(content: Any, environment: bool = True, key: str = "") -> Any:
    """Plain values without secrets: a text or a number under a key that is called like one is hidden, in lists and blocks
    too, and so is who asks in an address or a header; where asked for, a text out of the ``environment`` becomes the
    ``${oc.env:...}`` it was written as. ``key``: what it stands under, dotted."""
    if isinstance(content, dict):
        return {name: redacted(value, environment, f"{key}.{name}") for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [redacted(value, environment, key) for value in content]
    if isinstance(content, bool) or content in (None, ""):
        return content
    of_texts = _SECRET_OF_A_MODEL if _A_MODELS.search(key) else _SECRET
    if (of_texts if isinstance(content, str) else _SECRET_NUMBER).search(key):
        return HIDDEN
    if not isinstance(content, str):
        return content
    content = _unaddressed(content)
    return _renamed(content, _from_environment) if environment else content


def spoken(text: str) -> str:
    """A text for the screen: paths and words out of the environment stay, for whoever looks for the mistake in them; what a
    variable called like a secret held becomes its name, and who asks in an address or a header is hidden."""
    text = _renamed(text, {value: name for value, name in _from_environment.items() if _SECRET.search(name)})
    return _unaddressed(text)


def _unaddressed(text: str) -> str:
    """Without who asks, or by which token, in an address or a header."""
    return _IN_TEXT.sub(lambda found: f"{next(filter(None, found.groups()))}{HIDDEN}", text)


def _renamed(text: str, names: Mapping[str, str]) -> str:
    for value in sorted(names, key=len, reverse=True):
        if text == value or len(value) >= _SHORT:
            text = text.replace(value, names[value])
    return text
