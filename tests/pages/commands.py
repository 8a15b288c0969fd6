"""Whether a line of a console block is a command that its program takes. Nothing is run."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import yaml
from packaging.requirements import InvalidRequirement, Requirement

from fedtune.cli import build_parser
from tests.pages.blocks import ROOT

# what no test here knows the options of
OTHERS = {
    "cd", "cp", "cyclonedx-py", "export", "flower-superlink", "flower-supernode", "flwr", "git", "head", "lint-imports",
    "mkdocs", "mlflow", "mypy", "pre-commit", "ruff", "ssh", "systemctl", "tensorboard", "wandb", ".",
}  # fmt: skip
SHELL = {"for", "done", "do"}
PROMPT = re.compile(r"^(?:[\w-]*\$) ")


def commands(text: str) -> Iterator[str]:
    """The lines that are typed: after a prompt where there is one, else all of them."""
    lines = text.replace("\\\n", " ").splitlines()
    if any(PROMPT.match(line) for line in lines):
        lines = [line for line in lines if PROMPT.match(line)]
    yield from (PROMPT.sub("", line) for line in lines if line.strip() and not line.startswith("#"))


def wrong(line: str) -> str:
    """What is wrong with a command line; "" where nothing is."""
    try:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split = True
        words = list(lexer)
    except ValueError as error:
        return str(error)
    found = [wrong_command(words) for words in simple(words)]
    return "; ".join(filter(None, found))


def simple(words: list[str]) -> Iterator[list[str]]:
    """Single commands, without variables before them and redirections behind them."""
    command: list[str] = []
    for word in [*words, ";"]:
        if re.fullmatch(r"[&|;]+", word):
            while command and (re.fullmatch(r"[A-Z_]+=.*", command[0]) or command[0] in ("nice", "do")):
                command = command[1:]
            if command and command[0] not in SHELL:
                yield command
            command = []
        elif word in ("<", ">", ">>"):
            command.append(">")
        else:
            command.append(word)
            if command[-2:-1] == [">"]:
                del command[-2:]


def wrong_command(words: list[str]) -> str:
    program, *rest = words
    check = {
        "fedtune": of_fedtune,
        "pip": of_pip,
        "python": of_python,
        "python3": of_python,
        "pytest": of_pytest,
        "docker": of_docker,
        "bash": lambda rest: "" if (ROOT / rest[0]).exists() else f"no file {rest[0]}",
    }.get(program.rpartition("/")[2] if program.startswith("/") else program)
    if check:
        return check(rest)
    if program in OTHERS or (ROOT / program).is_file():
        return ""
    return f"no known program '{program}'"


def of_fedtune(words: list[str]) -> str:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            build_parser().parse_args(words)
    except SystemExit as ended:
        return "" if ended.code == 0 else said.getvalue().strip().splitlines()[-1]
    return ""


def of_pip(words: list[str]) -> str:
    """Extras are there; packages that are not fedtune are any package's business."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words[1:]:
        try:
            asked = Requirement(word.replace("./", "").replace(".[", "fedtune["))
        except InvalidRequirement:  # an option, or its file
            continue
        if asked.name == "fedtune" and (odd := asked.extras - extras.keys()):
            return f"no extra {', '.join(sorted(odd))}"
    return ""


def of_python(words: list[str]) -> str:
    """A module or script that is there and has every option that is named."""
    if words[0] == "-m":
        if words[1] in ("venv", "build"):
            return ""
        spec = importlib.util.find_spec(words[1])
        if spec is None:
            return f"no module {words[1]}"
        path = Path(str(spec.origin))
        path = path.with_name("__main__.py") if path.name == "__init__.py" else path
    else:
        path = ROOT / words[0]
    if not path.exists():
        return f"no file {path.relative_to(ROOT)}"
    text = path.read_text() + "".join(other.read_text() for other in path.parent.glob("record*.py"))
    options = [word.partition("=")[0] for word in words[1:] if word.startswith("--")]
    return "; ".join(f"{words[0]} has no {option}" for option in options if f'"{option}"' not in text)


def of_pytest(words: list[str]) -> str:
    paths = [word for word in words if word.startswith("tests")]
    return "; ".join(f"no {path}" for path in paths if not (ROOT / path.partition("::")[0]).exists())


def of_docker(words: list[str]) -> str:
    """Profiles and services of docker-compose.yml, and the fedtune commands that are run in them."""
    if words[0] != "compose":
        return ""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    profiles = {profile for service in services.values() for profile in service.get("profiles", ())}
    asked = words[words.index("--profile") + 1]
    named = [
        word
        for key in ("exec", "--exit-code-from", "--no-deps")
        if key in words
        for word in words[words.index(key) + 1 :][:1]
    ]
    odd = [name for name in named if name not in services] + [
        name for name in [asked] if name not in profiles
    ]
    if odd:
        return f"docker-compose.yml has no {', '.join(odd)}"
    return of_fedtune(words[words.index("fedtune") + 1 :]) if "fedtune" in words else ""
