"""Finds `az` commands in texts and checks their options; `az ml` itself cannot be installed from PyPI.

COMMANDS is from the reference of Azure CLI's ml extension 2.x and of the core commands (learn.microsoft.com/cli/azure):
each command with the options that this repository may use. `!` marks required options.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

GLOBAL = {"--resource-group", "--workspace-name", "--output", "--query", "--only-show-errors", "--subscription"}
_CREATE = "!--file --name --set --no-wait"
COMMANDS = {
    "extension add": "!--name --version --upgrade",
    "configure": "!--defaults",
    "ml online-endpoint create": f"{_CREATE} --auth-mode --local",
    "ml online-endpoint update": "--name --file --traffic --mirror-traffic --defaults --set --no-wait",
    "ml online-endpoint invoke": "!--name !--request-file --deployment-name --local",
    "ml online-endpoint show": "!--name --local",
    "ml online-endpoint list": "--local",
    "ml online-endpoint delete": "!--name --yes --no-wait",
    "ml online-endpoint get-credentials": "!--name",
    "ml online-deployment create": f"{_CREATE} --endpoint-name --all-traffic --skip-script-validation --local",
    "ml online-deployment update": "--file --name --endpoint-name --set --no-wait",
    "ml online-deployment show": "!--name !--endpoint-name",
    "ml online-deployment get-logs": "!--name !--endpoint-name --lines --container --local",
    "ml online-deployment delete": "!--name !--endpoint-name --yes --no-wait",
    "ml batch-endpoint create": f"{_CREATE} --auth-mode",
    "ml batch-endpoint invoke": "!--name --deployment-name --input --input-type --output-path --mini-batch-size "
    "--instance-count --job-name --set --inputs --outputs --file",
    "ml batch-endpoint show": "!--name",
    "ml batch-endpoint delete": "!--name --yes --no-wait",
    "ml batch-deployment create": f"{_CREATE} --endpoint-name --set-default --skip-script-validation",
    "ml batch-deployment delete": "!--name !--endpoint-name --yes",
    "ml compute create": "--file --name --type --size --min-instances --max-instances --set",
    "ml job create": "!--file --name --set --stream --web",
    "ml job stream": "!--name",
    "ml job download": "!--name --output-name --download-path --all",
    "ml data create": "--file --name --version --path --type",
    "ml schedule create": "!--file --set --no-wait",
    "ml model create": "--file --name --version --path --type --set --description",
    "ml environment create": "--file --name --version --image --conda-file --set",
    "ml workspace update": "--name --managed-network --public-network-access",
    "role assignment create": "!--assignee !--role !--scope",
    "deployment group create": "!--template-file --parameters --name",
}


@dataclass(frozen=True)
class AzCommand:
    """A command in a text: file, line, name, and the values of each option; a flag has none."""

    source: str
    line: int
    name: str
    options: dict[str, list[str]]

    def one(self, option: str) -> str | None:
        """Return an option's single value; None if it is missing or a shell variable."""
        words = self.options.get(option, [])
        return words[0] if len(words) == 1 and "$" not in words[0] else None

    @property
    def changes(self) -> dict[str, str]:
        return dict(word.partition("=")[::2] for word in self.options.get("--set", []))


def az_commands(path: Path) -> list[AzCommand]:
    """Return every `az` command of a Markdown page, a shell script, or the comments of a YAML file."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = []
    for number, line in enumerate(text.splitlines(), 1):
        for match in re.finditer(r"(?:^|[\s`($])az (?=(?:ml|extension|configure|role|deployment) )([^`|>]*)", line):
            if path.suffix == ".md" and not _is_command(line, match):
                continue
            if line[match.start()] == "`" and "--" not in match[1]:
                continue  # only its name in a sentence
            words = _words(match[1])
            name = next(
                (" ".join(words[:n]) for n in (3, 2, 1) if " ".join(words[:n]) in COMMANDS), " ".join(words[:3])
            )
            commands.append(AzCommand(str(path), number, name, _options(words[len(name.split()) :])))
    return commands


def _is_command(line: str, match: "re.Match[str]") -> bool:
    """Whether a mention on a page is a command: on its own line, in an assignment, or in backquotes."""
    return line.strip().startswith("az ") or "=$(az" in line or line[match.start()] == "`"


def _words(text: str) -> list[str]:
    """Return the words of a command, without the shell code that follows it."""
    text, words = text.replace("`", ""), []
    try:
        split = shlex.split(text, comments=True)
    except ValueError:  # in the middle of a message
        split = text.replace('\\"', " ").replace('"', " ").split()
    for word in split:
        words.append(word.rstrip(")") if word.endswith(")") and "(" not in word else word)
        if (word.endswith(")") and "(" not in word) or word in (";", "&&", "||", "then"):
            break
    return [word for word in words if word not in (";", "&&", "||", "then")]


def _options(words: list[str]) -> dict[str, list[str]]:
    options: dict[str, list[str]] = {}
    current: list[str] | None = None
    for word in words:
        if word.startswith("--"):
            name, eq, value = word.partition("=")
            current = options.setdefault(name, [])
            current += [value] if eq else []
        elif current is None:
            options.setdefault("", []).append(word)
        else:
            current.append(word)
    return options
