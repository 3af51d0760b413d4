"""Keeps secrets of a config out of what a run writes and says: ``config.json``, ``results.json``, checkpoints, errors."""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "(hidden)"
_OPENING = ("access|account|api|auth|aws|azure|client|comet|deploy|encryption|gcp|google|gpg|hf|hub|license|master|mlflow|"
            "openai|private|s3|signing|ssh|storage|wandb")
_KEYS = (r"secret|passw|passphrase|credential|authorization|cookie|jwt|(?<![a-z])(pwd|pass)(?![_a-z])|"
         rf"({_OPENING})[-_.]?keys?(?-i:(?![a-z]))")
_OF_MODELS = ("class", "cls", "dist", "mask", "num", "pad", "pos", "prompt", "reg", "register")     # tokens of theirs
_TOKEN = "".join(f"(?<!{word}_)" for word in _OF_MODELS) + "tokens?(?![-_]?[a-z])"
_SECRET = re.compile(f"token(?!i[sz])|{_KEYS}", re.IGNORECASE)
_SECRET_OF_A_MODEL = re.compile(f"{_TOKEN}|{_KEYS}", re.IGNORECASE)
_A_MODELS = re.compile(r"(^|\.)(backbone\.kwargs|method_kwargs)\.")
_SECRET_NUMBER = re.compile(rf"(^|[.-]|(access|api|auth|hf|hub)_?)token$|{_KEYS}", re.IGNORECASE)  # others count, or switch

# In a text: the patterns take time linear in its length (each run of characters is entered once, or ends at what begins one).
_WORD = r"\d*(?:[a-z]+\d*)?"
_PORT = rf"""\d+(?: (?:/[^:@?"']*)? (?:\?[\w.-]+= | ["']) | / (?:{_WORD}[._/-])* {_WORD}@)"""        # and path of plain words
_UP_TO_AT = re.compile(r"(?<!\S)\S+@(?!\dx\.(png|jpe?g|webp)\b)")         # not of image@2x.png
_WHO = re.compile(rf"(:/{{1,2}}) (?: [^/?]+ | [^/:@]* : (?!{_PORT}) .* ) (?=@)", re.VERBOSE)
_BEARER = re.compile(r"""(\bbearer\s+)(?!authenti|authori|credential)[^\s"',;]{12,}""", re.IGNORECASE)
_ASSIGNED = re.compile(
    r"""(?P<asks>[?&;#]?)(?P<around>(?:\\?["'])?)(?P<name>(?<![\w.-])[\w.-]+)(?P<closed>(?:\\?["'])?)"""
    r"""[ \t]*[:=]{1,2}[ \t]*(?P<opened>(?:[bBrRuU]{0,2}(?:\"{3}|'{3}|''(?=\w)|\\?["']))?)"""
)
_ISSUED = re.compile(           # by GitHub, Hugging Face, OpenAI, GitLab, Slack
    r"\b(gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{22,}|hf_[A-Za-z0-9]{30,}|(sk|glpat|xox[abprs])-(?=[\w-]{0,40}\d)[\w-]{20,})"
)
_HEADER = re.compile("authorization$", re.IGNORECASE)
_PARAMETER = re.compile(r"^(key|sig|auth|[\w.-]*pwd)$|signature", re.IGNORECASE)
_NUMBER = re.compile(r"""([-+]?[\d.]+(e[-+]?\d+)?|true|false|none|null)(?![^\s"',;&#)}\]])""", re.IGNORECASE)
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
    if _is_secret(key, isinstance(content, str)):
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


def _is_secret(key: str, text: bool) -> bool:
    """Whether a text, or a number, under this key is one."""
    of_a_model = _A_MODELS.search(key)
    if text:
        return bool((_SECRET_OF_A_MODEL if of_a_model else _SECRET).search(key))
    return bool(_SECRET_NUMBER.search(key)) and not (of_a_model and key.endswith("keys"))       # it counts them


def _unaddressed(text: str) -> str:
    """Without who asks in an address (``https://user:password@host``) or a header, and what ``name=value`` gives away."""
    text = _UP_TO_AT.sub(lambda found: _WHO.sub(rf"\1{HIDDEN}", found[0]), text)
    return _ISSUED.sub(HIDDEN, _BEARER.sub(rf"\1{HIDDEN}", _unassigned(text)))


def _unassigned(text: str) -> str:
    parts, end = [], 0
    for found in _ASSIGNED.finditer(text):
        if found.start() >= end and (secret := _secret_after(found)):
            parts += [text[end : found.end()], HIDDEN]
            end = secret.end()
    return "".join((*parts, text[end:]))


def _secret_after(found: re.Match[str]) -> re.Match[str] | None:
    """What a name in a text is given, if that is a secret: a header's up to the end of its line or quotes."""
    text, begin = found.string, found.end()
    header = _HEADER.search(found["name"])
    parameter = found["asks"] and _PARAMETER.search(found["name"])
    number = not found["opened"] and _NUMBER.match(text, begin)
    if not (header or parameter or _is_secret(found["name"], text=not number)):
        return None
    if header or found["opened"]:
        quote = found["opened"].lstrip("bBrRuU") or (not found["closed"] and found["around"])
        value = rf"(?:(?!{re.escape(quote)})(?:\\.|.))+" if quote else ".+"
    elif text.startswith(("[", "(", "{"), begin) and not text.startswith(HIDDEN, begin):
        value = ".+"
    else:
        value = r"""[^\s"'&;#]+""" if found["asks"] else r"""[^\s"',;&]+"""
    return re.compile(value).match(text, begin)


def _renamed(text: str, names: Mapping[str, str]) -> str:
    for value in sorted(names, key=len, reverse=True):
        if text == value or len(value) >= _SHORT:
            text = text.replace(value, names[value])
    return text
