"""Starting the server: as the launcher does, as Azure and users do by hand, and what is said when it cannot start."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import mptserve
from insights import Ingestion
from local_azure.ports import free_port
from mptserve.azure_server.launch import Server, ServerDied, host_environment, progress_line, why_it_died
from mptserve.settings import FIELDS
from serving import MODEL_DIR, ROOT, SAMPLE, LoggedServer, eventually, get, post

pytestmark = pytest.mark.long

SCORE = ROOT / "score"
SETTINGS = sorted(field.metadata["env"] for field in FIELDS)


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "mptserve.cli", *args]


# Settings


def test_host_runs_one_process_with_threads_for_twice_the_concurrency_and_the_probe() -> None:
    assert host_environment() == {
        "WORKER_COUNT": "1",
        "WORKER_TIMEOUT": "300",
        "GUNICORN_CMD_ARGS": "--worker-class gthread --threads 72 --graceful-timeout 170 --no-control-socket",
        "APP_INSIGHTS_LOG_RESPONSE_ENABLED": "false",
    }
    assert host_environment(threads=12)["GUNICORN_CMD_ARGS"].split()[3] == "12"


def test_server_runs_threads_and_not_the_hosts_default_of_one_synchronous_worker(server: LoggedServer) -> None:
    """Under the synchronous worker, the timeout would also kill a long stream."""
    assert [line.rpartition("Using worker: ")[2] for line in server.output if "Using worker" in line] == ["gthread"]
    assert len(server.worker_pids()) == 1


# Launches by hand


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory, ingestion: Ingestion) -> Iterator[dict[str, int]]:
    """Ports of servers that users started in their own ways, all with another mptserve on PYTHONPATH.

    That one stands for an installed copy: were it imported, the server would not start. All log to Application
    Insights, under the host's own defaults.
    """
    tmp = tmp_path_factory.mktemp("launches")
    decoy = tmp / "site-packages" / "mptserve"
    decoy.mkdir(parents=True)
    (decoy / "__init__.py").write_text('raise ImportError("an installed mptserve was imported")\n')
    copy = tmp / "upload" / "my_code"
    shutil.copytree(SCORE, copy, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    init = copy / "mptserve" / "__init__.py"
    init.write_text(re.sub('__version__ = ".*"', '__version__ = "9.9.9"', init.read_text()))
    ways = {
        "from the repository's root": (ROOT, "score/score.py"),
        "from elsewhere": (tmp, str(SCORE / "score.py")),
        "from inside score": (SCORE, "score.py"),
        "a copy of score alone, under another name": (tmp / "upload", "my_code/score.py"),
    }
    environ = os.environ | host_environment() | ingestion.environ
    environ |= {"AZUREML_MODEL_DIR": str(MODEL_DIR), "PYTHONPATH": str(decoy.parent)}
    del environ["APP_INSIGHTS_LOG_RESPONSE_ENABLED"]
    program = str(Path(sys.executable).with_name("azmlinfsrv"))
    ports = {way: free_port() for way in ways}
    processes = []
    for way, (cwd, script) in ways.items():
        log = (tmp / f"{ports[way]}.log").open("wb")
        args = [program, "--entry_script", script, "--port", str(ports[way])]
        processes.append(
            subprocess.Popen(args, cwd=cwd, env=environ, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        )
        log.close()
    try:
        for process, port in zip(processes, ports.values(), strict=True):
            log_path = tmp / f"{port}.log"

            def up(process: subprocess.Popen[bytes] = process, port: int = port, log_path: Path = log_path) -> bool:
                assert process.poll() is None, log_path.read_text()
                return answers(port)

            eventually(up, f"the start of a server on port {port}")
        yield ports
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(port: int) -> bool:
    try:
        return get(port, "/").status == 200
    except ConnectionError:
        return False


@pytest.mark.parametrize(
    ("way", "version"),
    [
        ("from the repository's root", mptserve.__version__),
        ("from elsewhere", mptserve.__version__),
        ("from inside score", mptserve.__version__),
        ("a copy of score alone, under another name", "9.9.9"),
    ],
)
def test_the_package_beside_the_script_runs_never_an_installed_one(
    launches: dict[str, int], way: str, version: str
) -> None:
    assert get(launches[way], "/swagger.json").json["info"]["version"] == version
    assert post(launches[way], SAMPLE.read_bytes()).status == 200


def test_answers_are_kept_from_application_insights_unless_an_operator_asks_for_them(
    launches: dict[str, int], ingestion: Ingestion
) -> None:
    """The host's default is to log them whole."""
    port = launches["from elsewhere"]
    assert post(port, SAMPLE.read_bytes(), {"x-request-id": "by-default"}).status == 200
    span = ingestion.span("by-default")
    assert (span["resultCode"], span.get("Response Value", "")) == ("200", "")


# Servers that cannot start


@pytest.fixture(scope="module")
def deaths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The messages of servers that cannot start, by what is wrong; started together, as each takes seconds."""
    crowded = tmp_path_factory.mktemp("crowded")
    for i in range(100):
        (crowded / f"{i}.txt").touch()
    wrong = {
        "no model": {"AZUREML_MODEL_DIR": str(crowded)},
        "bad value": {"MPT_MAX_ROWS": "many"},
        "typo": {"MPT_FOO": "1"},
        "fork": {"WORKER_PRELOAD": "true"},
    }
    messages = {}
    with ExitStack() as stack:
        servers = {what: stack.enter_context(LoggedServer(environ)) for what, environ in wrong.items()}
        for what, server in servers.items():
            with pytest.raises(ServerDied) as caught:
                server.wait_until_healthy()
            messages[what] = str(caught.value).replace(str(crowded), "<crowded>")
    return messages


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (  # the host lists the folder after our message: a hundred lines here
            "no model",
            "ModelNotFound: no MPT checkpoint (config.json of model_type mpt with *.safetensors or *.bin) "
            "in <crowded> or 5 levels below",
        ),
        ("bad value", "BadSetting: MPT_MAX_ROWS must be a number (int), got 'many'"),
        ("typo", f"BadSetting: MPT_FOO is not a setting; the settings are {', '.join(SETTINGS)}"),
    ],
)
def test_a_server_that_cannot_start_ends_and_names_what_is_wrong(
    deaths: dict[str, str], what: str, message: str
) -> None:
    assert deaths[what] == f"azmlinfsrv ended with 3: {message}"


def test_a_worker_that_would_be_forked_from_a_loaded_model_ends_and_names_the_setting(deaths: dict[str, str]) -> None:
    """The engine's thread is not in it: it would look healthy and answer nobody."""
    assert deaths["fork"].startswith("azmlinfsrv ended with 3: ")
    assert '"the model was loaded before gunicorn forked its worker; unset WORKER_PRELOAD"' in deaths["fork"]


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock.getsockname()[1]


def test_a_port_in_use_is_said_at_once(taken_port: int) -> None:
    """Whoever uses it might answer GET / in the server's place."""
    with pytest.raises(ServerDied) as caught:
        Server(taken_port, MODEL_DIR)
    assert str(caught.value) == f"port {taken_port} is in use; choose another one"


def test_a_port_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ServerDied, match=r"^port 70000 cannot be used \(.*\); choose another one$"):
        Server(70000, MODEL_DIR)


def test_why_it_died_is_the_packages_last_message_or_the_end_of_the_output() -> None:
    trace = ["Traceback (most recent call last):", '  File "x.py", line 1, in y']
    told = [
        *trace,
        "mptserve.errors.BadWeights: 2 tensors do not fit:",
        "  missing a",
        "  missing b",
        "",
        *trace,
        "E: no",
    ]
    assert why_it_died(told) == "BadWeights: 2 tensors do not fit:\n  missing a\n  missing b"
    assert why_it_died([str(i) for i in range(30)]) == "\n" + "\n".join(str(i) for i in range(5, 30))


# The command


def test_demo_prints_the_request_the_answer_and_its_speed_and_stops_the_server() -> None:
    port = free_port()
    done = subprocess.run(command("demo", "--port", str(port)), capture_output=True, text=True, timeout=120)
    number = r"[\d.,]+"
    expected = (
        rf"starting azmlinfsrv on port {port} with {re.escape(str(MODEL_DIR))}\n"
        rf"  preflight: weights {number} GB, {number} GB free\n"
        rf"(  (loading weights|weights loaded): \d+ %, {number} GB in {number} s\n)+"
        rf"  engine ready: 8\.4 M parameters, \w+ on cpu, context 2048 tokens, \d+ KV blocks\n"
        rf"healthy after {number} s\n"
        rf"\nPOST http://127\.0\.0\.1:{port}/score\n{re.escape(SAMPLE.read_text().strip())}\n\n"
        r'\[\n  \{\n    "0": "the meaning of life is .*"\n  \}\n\]\n'
        rf"\nstatus 200, finished by length, 10 tokens in {number} ms, {number} tokens/s\n"
    )
    assert re.fullmatch(expected, done.stdout), done.stdout
    assert (done.returncode, done.stderr) == (0, "")
    with pytest.raises(ConnectionRefusedError):
        get(port, "/")


def test_demo_says_why_it_cannot_start_on_one_line(taken_port: int) -> None:
    done = subprocess.run(command("demo", "--port", str(taken_port)), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"port {taken_port} is in use; choose another one\n"


def test_serve_tells_how_to_call_it_and_ends_its_server_when_it_is_ended() -> None:
    port = free_port()
    environ = os.environ | {"PYTHONUNBUFFERED": "1"}
    serving = subprocess.Popen(
        command("serve", "--port", str(port)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
    )
    assert serving.stdout is not None
    try:
        told = ""
        while "Ctrl-C" not in told:
            line = serving.stdout.readline()
            assert line, told
            told += line
        [curl] = [line.strip() for line in told.splitlines() if "curl" in line]
        assert curl.endswith(f" http://127.0.0.1:{port}/score")
        assert post(port, SAMPLE.read_bytes()).status == 200
    finally:
        serving.send_signal(signal.SIGTERM)
        _, complaints = serving.communicate(timeout=120)
    assert (serving.returncode, complaints) == (0, "")
    with pytest.raises(ConnectionRefusedError):
        get(port, "/")


def test_progress_lines_are_made_of_the_servers_log_and_nothing_else() -> None:
    ready = (
        '{"message": "engine ready", "device": "cuda:0", "dtype": "torch.bfloat16", "parameters": 6649286656, '
        '"max_tokens": 2048, "kv_blocks": 1024, "seconds": 30.1}'
    )
    told = "engine ready: 6,649.3 M parameters, bfloat16 on cuda:0, context 2048 tokens, 1024 KV blocks"
    assert progress_line(ready) == told
    for line in ('{"message": "request", "status": 200}', "I [1] azmlinfsrv - engine ready", "{not JSON", ""):
        assert progress_line(line) is None
