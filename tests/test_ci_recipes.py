"""The recipes of ci/ and docs/ci.md: their form, their scripts run by bash, and every command line that they hold.

No CI service runs here. What GitHub demands of actions and workflows is written below as checks, which are checked
themselves: each finds the mistake that it is for.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click
import pytest
import yaml
from projects import SMALL, TWO, Project, project

from amoeba_deploy.cli import main
from amoeba_deploy.delivery.signing import Trust, read_release, verify_signature
from amoeba_deploy.project.report import HEAD

__all__ = ["project"]

ROOT = Path(__file__).parent.parent
ACTION, WORKFLOW = ROOT / "ci" / "github" / "action.yml", ROOT / "ci" / "github" / "build-engines.yml"
CONTAINER, PAGE = ROOT / "ci" / "Containerfile", ROOT / "docs" / "ci.md"
OURS = "OWNER/amoeba-deploy/ci/github@v1"
if not ACTION.is_file():
    pytest.skip("the recipes are in the repository only", allow_module_level=True)

Value = Any


def load(text: str) -> Value:
    """YAML with every scalar as text: 'on' and 'false' stay what they are."""
    return yaml.load(text, Loader=yaml.BaseLoader)


@pytest.fixture
def action() -> Value:
    """The composite action."""
    return load(ACTION.read_text())


@pytest.fixture
def workflow() -> Value:
    """The example workflow."""
    return load(WORKFLOW.read_text())


def expressions(value: Value) -> list[str]:
    """What stands in ``${{ }}``, and all of what stands behind ``if``, anywhere in a value."""
    if isinstance(value, dict):
        own = [value["if"]] if isinstance(value.get("if"), str) else []
        return own + [found for each in value.values() for found in expressions(each)]
    if isinstance(value, list):
        return [found for each in value for found in expressions(each)]
    return re.findall(r"\$\{\{(.*?)\}\}", value, re.DOTALL)


# Checks, each a list of what is wrong


STEP_KEYS = {"name", "id", "if", "uses", "with", "run", "shell", "env", "working-directory", "continue-on-error"}
GIVEN = {
    "GITHUB_STEP_SUMMARY",
    "GITHUB_OUTPUT",
    "GITHUB_ENV",
    "RUNNER_TEMP",
    "RUNNER_OS",
    "RUNNER_ARCH",
    "AMOEBA_CACHE",
}
"""Variables that a runner sets, and the one that the action sets by GITHUB_ENV."""


def wrong_steps(steps: list[Value], composite: bool) -> Iterator[str]:
    """What is wrong with single steps."""
    for step in steps:
        name = step.get("name", step.get("uses", "a step"))
        if set(step) - STEP_KEYS:
            yield f"{name}: unknown keys {set(step) - STEP_KEYS}"
        if ("uses" in step) == ("run" in step):
            yield f"{name}: neither or both of uses and run"
        if "run" in step:
            if composite and step.get("shell") != "bash":
                yield f"{name}: no shell"
            if "${{" in step["run"]:
                yield f"{name}: an expression becomes a part of its script"
            used = set(re.findall(r"\$\{?([A-Z][A-Z0-9_]*)", step["run"]))
            if used - set(step.get("env", {})) - GIVEN:
                yield f"{name}: unset variables {used - set(step.get('env', {})) - GIVEN}"
        elif not re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w./-]+)?@v\d+", step.get("uses", "")):
            yield f"{name}: {step.get('uses')} is not pinned to a major version"


def wrong_action(action: Value) -> list[str]:
    """What is wrong with a composite action."""
    found = [f"lacks {key}" for key in ("name", "description", "runs") if key not in action]
    found += [f"unknown key {key}" for key in set(action) - {"name", "description", "inputs", "outputs", "runs"}]
    runs, inputs = action["runs"], action["inputs"]
    if runs.get("using") != "composite":
        found.append("is not composite")
    for name, each in inputs.items():
        if set(each) != {"description", "default"}:
            found.append(f"input {name} has {set(each)}")
    found += wrong_steps(runs["steps"], composite=True)
    everything = expressions(runs["steps"])
    for text in everything + expressions(action.get("outputs", {})):
        for name in re.findall(r"\binputs\.([\w-]+)", text):
            if name not in inputs:
                found.append(f"no input {name}")
        if re.search(r"\b(secrets|needs|vars)\.", text):
            found.append(f"an action does not see {text}")
        for step, output in re.findall(r"\bsteps\.(\w+)\.outputs\.([\w-]+)", text):
            scripts = [each.get("run", "") for each in runs["steps"] if each.get("id") == step]
            if not any(f'"{output}=' in script for script in scripts):
                found.append(f"step {step} has no output {output}")
    used = {name for text in everything for name in re.findall(r"\binputs\.([\w-]+)", text)}
    found += [f"input {name} is not used" for name in set(inputs) - used]
    for name, each in action.get("outputs", {}).items():
        if set(each) != {"description", "value"}:
            found.append(f"output {name} has {set(each)}")
    return found


JOB_KEYS = {
    "if",
    "runs-on",
    "timeout-minutes",
    "environment",
    "permissions",
    "steps",
    "strategy",
    "needs",
    "name",
    "env",
}


def wrong_workflow(workflow: Value, action: Value) -> list[str]:
    """What is wrong with a workflow that uses the action, or is risky in it."""
    found = [f"lacks {key}" for key in ("on", "jobs", "permissions") if key not in workflow]
    found += [f"unknown {key}" for key in set(workflow) - {"name", "on", "permissions", "concurrency", "jobs"}]
    if workflow.get("permissions") != {"contents": "read"}:
        found.append("its token can more than read by default")
    if "pull_request_target" in str(workflow.get("on")):
        found.append("it runs the code of forks with secrets")
    for name, job in workflow["jobs"].items():
        found += [f"{name}: unknown {key}" for key in set(job) - JOB_KEYS]
        found += [f"{name}: lacks {key}" for key in ("runs-on", "steps") if key not in job]
        steps = job.get("steps", [])
        found += [f"{name}: {each}" for each in wrong_steps(steps, composite=False)]
        if "write" in str(job.get("permissions")) and job["permissions"] != {"contents": "read", "packages": "write"}:
            found.append(f"{name}: its token can more than it needs")
        if any("secrets." in text for text in expressions(steps)):
            if "environment" not in job:
                found.append(f"{name}: its secrets are not kept in an environment")
            if "pull_request" in job.get("if", "pull_request"):
                found.append(f"{name}: a pull request sees its secrets")
        found += wrong_uses(steps, action)
    return found


def wrong_uses(steps: list[Value], action: Value) -> list[str]:
    """Inputs that are given to our action and that it does not have."""
    given = {name for step in steps if step.get("uses") == OURS for name in step.get("with", {})}
    return [f"the action has no input {name}" for name in given - set(action["inputs"])]


# Form


def test_the_action_is_in_order(action: Value) -> None:
    assert wrong_action(action) == []


def test_the_workflow_is_in_order(workflow: Value, action: Value) -> None:
    assert wrong_workflow(workflow, action) == []
    assert any(step.get("uses") == OURS for job in workflow["jobs"].values() for step in job["steps"])


def build_step(action: Value) -> Value:
    """The step that calls amoeba build."""
    (step,) = [each for each in action["runs"]["steps"] if each.get("id") == "build"]
    return step


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda a: a["runs"]["steps"][1].pop("shell"), "no shell"),
        (lambda a: build_step(a).update(run="amoeba build --tag ${{ inputs.tag }}"), "becomes a part of its script"),
        (lambda a: build_step(a).update(run="echo ${{ github.event.pull_request.title }}"), "part of its script"),
        (lambda a: build_step(a)["env"].pop("TAG"), "unset variables {'TAG'}"),
        (lambda a: build_step(a)["env"].update(TAG="${{ inputs.tagg }}"), "no input tagg"),
        (lambda a: build_step(a)["env"].update(TAG="${{ secrets.TAG }}"), "an action does not see"),
        (lambda a: build_step(a)["env"].update(RESULTS="${{ steps.prepare.outputs.result }}"), "no output result"),
        (lambda a: build_step(a).update(shel="bash"), "unknown keys {'shel'}"),
        (lambda a: build_step(a).update(uses="actions/cache@v5"), "both of uses and run"),
        (lambda a: a["runs"]["steps"][0].update(uses="actions/setup-python@main"), "is not pinned"),
        (lambda a: a["runs"].update(using="node24"), "is not composite"),
        (lambda a: a["inputs"].update(more={"description": "x", "default": ""}), "input more is not used"),
        (lambda a: a["inputs"]["tag"].pop("default"), "input tag has"),
        (lambda a: a.pop("description"), "lacks description"),
    ],
)
def test_a_mistake_in_an_action_is_found(action: Value, break_it: Callable[[Value], object], said: str) -> None:
    broken = copy.deepcopy(action)
    break_it(broken)
    assert any(said in each for each in wrong_action(broken)), wrong_action(broken)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda w: w.pop("permissions"), "lacks permissions"),
        (lambda w: w["jobs"]["release"]["permissions"].update(contents="write"), "more than it needs"),
        (lambda w: w["jobs"]["release"].pop("environment"), "not kept in an environment"),
        (lambda w: w["jobs"]["release"].pop("if"), "a pull request sees its secrets"),
        (lambda w: w.update(on={"pull_request_target": ""}), "code of forks"),
        (lambda w: w["jobs"]["check"]["steps"][1]["with"].update(fail_if="x"), "no input fail_if"),
        (lambda w: w["jobs"]["check"].pop("runs-on"), "lacks runs-on"),
        (lambda w: w["jobs"]["check"].update(run_on="x"), "unknown run_on"),
    ],
)
def test_a_mistake_in_a_workflow_is_found(
    workflow: Value, action: Value, break_it: Callable[[Value], object], said: str
) -> None:
    broken = copy.deepcopy(workflow)
    break_it(broken)
    assert any(said in each for each in wrong_workflow(broken, action)), wrong_workflow(broken, action)


def test_extras_that_the_recipes_install_exist(action: Value) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = [action["inputs"]["extras"]["default"], *re.findall(r"EXTRAS=(\S+)", CONTAINER.read_text())]
    named += re.findall(r"EXTRAS=(\S+)", PAGE.read_text()) + re.findall(
        r"amoeba-deploy\[([a-z,-]+)\]", PAGE.read_text()
    )
    assert len(named) >= 4
    assert {name for each in named for name in each.split(",")} <= set(extras)


# Scripts


def scripts() -> dict[str, str]:
    """Every script of the recipes by where it stands."""
    steps = load(ACTION.read_text())["runs"]["steps"]
    jobs = load(WORKFLOW.read_text())["jobs"].values()
    found = {f"action: {step['name']}": step["run"] for step in steps if "run" in step}
    found |= {step["name"]: step["run"] for job in jobs for step in job["steps"] if "run" in step}
    lines = [line for block in blocks("yaml") for line in gitlab_lines(load(block))]
    found |= {f"docs: {line}": line for line in lines}
    return found | {f"docs: {text.splitlines()[0]}": text for text in blocks("")}


def blocks(language: str) -> list[str]:
    """The blocks of code of the page in one language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def gitlab_lines(value: Value) -> list[str]:
    """The scripts of GitLab's jobs in a block."""
    if not isinstance(value, dict):
        return []
    return [line for job in value.values() if isinstance(job, dict) for line in job.get("script", [])]


@pytest.mark.parametrize("name", scripts())
def test_bash_reads_every_script(name: str) -> None:
    done = subprocess.run(["bash", "-n"], input=scripts()[name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("name", scripts())
def test_shellcheck_has_nothing_to_say(name: str) -> None:
    command = ["shellcheck", "--shell=bash", "-"]
    done = subprocess.run(command, input=scripts()[name], capture_output=True, text=True, check=False)
    assert done.stdout == ""


# Command lines


def command_lines(text: str) -> list[list[str]]:
    """The words of every call of amoeba in a shell script, without what it is piped or redirected to."""
    found = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        reader = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
        reader.whitespace_split = True
        words, current = [*reader, ";"], list[str]()
        for word in words:
            if not re.fullmatch(r"[|&;<>()]+", word):
                current.append(word)
                continue
            if current[:1] == ["amoeba"]:
                found.append(current[1:])
            current = []
    return found


def check_command(words: list[str]) -> None:
    """Parse a command line as the command does; raises click.UsageError where it would refuse it."""
    context, command = click.Context(main, info_name="amoeba"), main
    if words[0].startswith("--"):
        assert set(words) <= {option for param in main.params for option in param.opts}, words
        return
    while isinstance(command, click.Group):
        name, found, words = command.resolve_command(context, words)
        assert found is not None
        context, command = click.Context(found, info_name=name, parent=context), found  # type: ignore[assignment]
    command.make_context(context.info_name, list(words), context.parent)


def every_command() -> list[list[str]]:
    """All command lines of the recipes and the page."""
    found = [words for text in scripts().values() for words in command_lines(text)]
    (inside,) = re.findall(r"^# +podman run .* amoeba-builder (.*)$", CONTAINER.read_text(), re.MULTILINE)
    return [*found, inside.split()]


@pytest.mark.parametrize("words", every_command(), ids=" ".join)
def test_every_command_line_is_one_that_amoeba_takes(words: list[str]) -> None:
    check_command([word for word in words if word != "${options[@]}"])


def test_options_that_a_script_puts_together_exist() -> None:
    build = main.commands["build"]
    known = {option for param in build.params for option in param.opts}
    script = build_step(load(ACTION.read_text()))["run"]
    used = set(re.findall(r"(?<=[ (])--[a-z-]+", script))
    assert {"--config", "--target", "--fail-if", "--junit", "--summary", "--json", "--sign", "--push"} <= used <= known


@pytest.mark.parametrize("line", ["build --jonit x", "build --jobs none", "biuld", "cache prune --older-than long"])
def test_a_mistaken_command_line_is_found(line: str) -> None:
    with pytest.raises((click.UsageError, click.exceptions.Exit)):
        check_command(line.split())


def test_commands_are_found_wherever_they_stand() -> None:
    text = 'x=$( (amoeba --version --json && echo "$W") | y)\namoeba build \\\n  --json > f || code=$? # amoeba no\n'
    assert command_lines(text) == [["--version", "--json"], ["build", "--json"]]


# The action's scripts, run


class Runner:
    """What a runner gives to the steps of the action: files, variables, and the command on the path."""

    def __init__(self, folder: Path, action: Value) -> None:
        self.folder, self.action = folder, action
        self.temp, self.output, self.summary = folder / "temp", folder / "output", folder / "summary.md"
        self.temp.mkdir(parents=True)
        self.variables = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("GITHUB", "RUNNER"))},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RUNNER_TEMP": str(self.temp),
            "RUNNER_OS": "Linux",
            "RUNNER_ARCH": "X64",
            "GITHUB_OUTPUT": str(self.output),
            "GITHUB_ENV": str(folder / "env"),
            "GITHUB_STEP_SUMMARY": str(self.summary),
        }

    def outputs(self) -> dict[str, str]:
        """What steps have put out."""
        return dict(line.split("=", 1) for line in self.output.read_text().splitlines())

    def step(self, name: str, work: Path, **inputs: str) -> subprocess.CompletedProcess[str]:
        """Run one step as GitHub does, its inputs those given or else at their defaults."""
        (step,) = [each for each in self.action["runs"]["steps"] if each["name"] == name]
        values = {name: each["default"] for name, each in self.action["inputs"].items()}
        values |= {name.replace("_", "-"): value for name, value in inputs.items()}

        def value(found: re.Match[str]) -> str:
            first = found[1].split("||")[0].strip()
            kind, _, rest = first.partition(".")
            return values[rest] if kind == "inputs" else self.outputs()[rest.rpartition(".")[2]]

        own = {key: re.sub(r"\$\{\{(.*?)\}\}", value, text) for key, text in step.get("env", {}).items()}
        script = self.folder / "script.sh"
        script.write_text(step["run"])
        command = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", str(script)]
        return subprocess.run(
            command, cwd=work, env={**self.variables, **own}, capture_output=True, text=True, check=False
        )


@pytest.fixture
def runner(tmp_path: Path, action: Value) -> Runner:
    """A runner whose preparing step is done."""
    made = Runner(tmp_path / "runner", action)
    done = made.step("Prepare", tmp_path)
    assert done.returncode == 0, done.stderr
    return made


@pytest.fixture
def recorded(runner: Runner) -> Callable[..., list[str]]:
    """The words that the build step gives to amoeba, for some inputs."""
    file = runner.folder / "bin" / "amoeba"
    file.parent.mkdir()
    file.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" > {runner.folder}/words\n')
    file.chmod(0o755)
    runner.variables["PATH"] = f"{file.parent}{os.pathsep}{runner.variables['PATH']}"

    def ask(**inputs: str) -> list[str]:
        done = runner.step("Build", runner.folder, **inputs)
        assert done.returncode == 0, done.stderr
        return (runner.folder / "words").read_text().split("\0")[:-1]

    return ask


def test_preparing_names_a_folder_a_key_and_the_cache(runner: Runner, tmp_path: Path) -> None:
    found = runner.outputs()
    assert Path(found["results"]).is_dir() and Path(found["results"]).parent == runner.temp
    assert re.fullmatch(r"amoeba-Linux-X64-[0-9a-f]{16}", found["key"])
    assert (runner.folder / "env").read_text() == f"AMOEBA_CACHE={os.environ['AMOEBA_CACHE']}\n"
    other = Runner(tmp_path / "other", runner.action)
    assert other.step("Prepare", tmp_path, targets="kiosk").returncode == 0
    assert other.outputs()["key"] != found["key"]


def test_an_action_without_inputs_calls_build_alone(recorded: Callable[..., list[str]], runner: Runner) -> None:
    results = runner.outputs()["results"]
    assert recorded() == [
        *("build", "--config=amoeba.toml", f"--summary={runner.summary}", f"--junit={results}/junit.xml", "--json")
    ]


def test_every_input_becomes_an_option(recorded: Callable[..., list[str]]) -> None:
    words = recorded(
        targets="kiosk, shelf\n desk", jobs="2", baseline="b.json", sign="true", serial="7", push="true", tag="v1",
        fail_if="size > 1MB\n\n  \nloss > baseline + 0.02\n",
    )  # fmt: skip
    assert words[5:] == [
        *("--target=kiosk", "--target=shelf", "--target=desk"),
        *("--fail-if=size > 1MB", "--fail-if=loss > baseline + 0.02", "--jobs=2", "--baseline=b.json"),
        *("--sign", "--serial=7", "--push", "--tag=v1"),
    ]
    check_command(words)


@pytest.mark.parametrize(
    "text", ["$(touch pwned)", "`touch pwned`", '"; touch pwned; "', "' && touch pwned #", "*", "-o x"]
)
def test_inputs_stay_words_whatever_they_hold(recorded: Callable[..., list[str]], runner: Runner, text: str) -> None:
    words = recorded(config=text, tag=text, jobs=text, baseline=text, fail_if=text, targets=text, sign=text)
    assert f"--config={text}" in words and f"--tag={text}" in words and f"--fail-if={text}" in words
    assert [word for word in words if word.startswith("--target=")] == [f"--target={part}" for part in text.split()]
    assert "--sign" not in words
    assert not list(runner.folder.rglob("pwned"))


def test_the_action_builds_a_project_signs_it_and_reports(project: Project, runner: Runner, tmp_path: Path) -> None:
    key, public = tmp_path / "key.pem", tmp_path / "key.pub"
    generate, publish = (line.partition("  ")[0] for line in blocks("")[2].splitlines()[:2])
    environment = {**os.environ, "P": "secret"}
    for command in (f"{generate} -passout env:P", f"{publish} -passin env:P"):
        subprocess.run(command, shell=True, cwd=tmp_path, env=environment, check=True, capture_output=True)
    project.write('[defaults]\nprivate-key = "env:AMOEBA_SIGNING_KEY"\n' + TWO)
    inputs = {"sign": "true", "signing_key": key.read_text(), "signing_key_password": "secret", "targets": "first"}
    done = runner.step("Build", project.folder, **inputs)
    assert done.returncode == 0, done.stderr
    found = runner.outputs()
    assert found["built"] == "true"
    (target,) = json.loads(Path(found["results"], "build.json").read_text())["targets"]
    assert (target["target"], target["state"]) == ("first", "built") and target["signed"]
    bundle = project.folder / target["bundle"]
    verify_signature(bundle, Trust((public,), ()))
    release = read_release(bundle)
    assert release is not None and release.serial == target["signed"]
    assert "| first | raspberry-pi-5 |" in runner.summary.read_text()
    assert len(list(ElementTree.parse(Path(found["results"], "junit.xml")).iter("testcase"))) == 1
    assert runner.step("Prune the cache", project.folder).returncode == 0


def test_a_broken_gate_fails_the_step_and_its_results_are_there(project: Project, runner: Runner) -> None:
    project.write(f"[targets.one]\n{SMALL}")
    done = runner.step("Build", project.folder, fail_if="size > 1MB")
    assert done.returncode == 5 and "breaks the gate 'size > 1MB'" in done.stderr
    found = runner.outputs()
    assert found["built"] == "true", "what was built is worth keeping"
    (gate,) = json.loads(Path(found["results"], "build.json").read_text())["gates"]
    assert gate["broken"] and "| broken |" in runner.summary.read_text()
    runner.output.write_text(f"results={found['results']}\n")
    assert runner.step("Build", project.folder).returncode == 0
    assert "built" not in runner.outputs(), "nothing is new for the cache"


def test_a_project_that_is_not_there_fails_the_step_with_one_sentence(runner: Runner, tmp_path: Path) -> None:
    done = runner.step("Build", tmp_path, config="none.toml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("amoeba: none.toml: is not there") and "built" not in runner.outputs()


# The image


INSTRUCTIONS = {"FROM", "ARG", "RUN", "ENV", "WORKDIR", "USER", "ENTRYPOINT", "CMD", "COPY", "LABEL", "VOLUME"}


def wrong_image(text: str) -> list[str]:
    """What is wrong with a Containerfile."""
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    read = [line.split(None, 1) for line in lines if line.strip()]
    found = [f"{word} is no instruction" for word, *_ in read if word not in INSTRUCTIONS]
    by_name = dict(read)
    if not re.fullmatch(r"[\w./-]+:[\w.-]+", by_name.get("FROM", "")) or by_name["FROM"].endswith(":latest"):
        found.append("its base has no tag")
    if by_name.get("USER", "root").partition(":")[0] in ("root", "0"):
        found.append("it runs as root")
    for word in ("ENTRYPOINT", "CMD"):
        try:
            json.loads(by_name.get(word, ""))
        except ValueError:
            found.append(f"{word} is no list")
    if "pip install" in text and "--no-cache-dir" not in text:
        found.append("pip's cache stays in it")
    if "apt-get install" in text and "rm -rf /var/lib/apt/lists" not in text:
        found.append("apt's lists stay in it")
    arguments = {line.split("=")[0] for word, line in read if word == "ARG"}
    used = set(re.findall(r"\$\{?([A-Z_]+)", by_name.get("RUN", "")))
    return found + [f"{name} is no ARG" for name in used - arguments]


def test_the_image_is_in_order() -> None:
    text = CONTAINER.read_text()
    assert wrong_image(text) == []
    assert 'ENTRYPOINT ["amoeba"]' in text and '"amoeba-deploy[$EXTRAS]$VERSION"' in text


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (":3.12-slim-bookworm", "", "no tag"),
        (":3.12-slim-bookworm", ":latest", "no tag"),
        ("USER 1000:1000\n", "", "runs as root"),
        ("USER 1000:1000\n", "USER 1000:1000\nUSER root\n", "runs as root"),
        ("WORKDIR", "WORKDRI", "no instruction"),
        ('["amoeba"]', "[amoeba]", "ENTRYPOINT is no list"),
        ("--no-cache-dir ", "", "pip's cache"),
        ("ARG VERSION=", "ARG VERSIONS=", "VERSION is no ARG"),
    ],
)
def test_a_mistake_in_an_image_is_found(old: str, new: str, said: str) -> None:
    text = CONTAINER.read_text()
    assert old in text
    assert any(said in each for each in wrong_image(text.replace(old, new)))


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run(["hadolint", str(CONTAINER)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


# The page


def test_the_page_names_every_input_and_output_and_no_others(action: Value) -> None:
    rows = re.findall(r"^\| (`.*?) \|", PAGE.read_text(), re.MULTILINE)
    table = {name for row in rows for name in re.findall(r"`([a-z0-9-]+)`", row)}
    assert set(action["inputs"]) <= table
    assert all(f"`{name}`" in PAGE.read_text() for name in action["outputs"])
    from amoeba_deploy.project.gate import QUANTITIES

    assert table - set(action["inputs"]) == set(QUANTITIES)


def test_blocks_for_github_give_the_action_inputs_that_it_has(action: Value) -> None:
    uses = 0
    for block in blocks("yaml"):
        value = load("\n".join(["job:", block]) if block.startswith(" ") else block)
        jobs = [*value.get("jobs", {}).values(), *([value["job"]] if "job" in value else [])]
        for steps in (job.get("steps", []) for job in jobs):
            uses += sum(step.get("uses") == OURS for step in steps)
            assert [*wrong_steps(steps, composite=False), *wrong_uses(steps, action)] == []
    assert uses == 2


def test_the_summary_of_the_page_has_the_form_that_build_writes() -> None:
    assert f"| {' | '.join(HEAD)} |" in PAGE.read_text()
    assert "### amoeba build: 2 of 2 targets" in PAGE.read_text()


def test_the_page_says_what_was_not_run() -> None:
    assert "**Not run on a CI service.**" in PAGE.read_text()


def test_the_settings_of_the_page_are_settings_of_a_project(tmp_path: Path) -> None:
    from amoeba_deploy.project.config import load_project

    (block,) = blocks("toml")
    file = tmp_path / "amoeba.toml"
    file.write_text(f"{block}\n[targets.one]\n{SMALL}")
    assert load_project(file).targets["one"].private_key == "env:AMOEBA_SIGNING_KEY"
