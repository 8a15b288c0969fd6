"""Flower's programs at a site cannot open its keys, its rows or its home: the kernel says no."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedtune.deploy.sandbox import restrict
from fedtune.deploy.supervisor import SANDBOX, bare
from fedtune.deploy.walls import walls
from fedtune.trust.authority import create

LANDLOCK = (
    subprocess.run(
        [sys.executable, "-SE", str(SANDBOX), "{}", str(os.getpid()), "true"],
        capture_output=True,
        check=False,
    ).stderr.find(b"cannot keep")
    < 0
)
pytestmark = pytest.mark.skipif(not LANDLOCK, reason="a kernel without Landlock")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("site")
    made = create(root / "authority", "hospitals", ["localhost"], 30)
    paths = {
        "keys": made.issue("site-a", 30),
        "data": root / "rows.jsonl",
        "home": root / "home",
        "policy": root / "policy.toml",
    }
    paths["data"].write_text("{}\n")
    paths["policy"].write_text("")
    (paths["home"] / "flower").mkdir(parents=True)
    (paths["home"] / "spool").mkdir()
    (paths["home"] / "spool" / "sequence").write_text("1")
    return paths


def inside(site: dict[str, Path], code: str, **env: str) -> str:
    """What a program behind the walls says."""
    flower = site["home"] / "flower"
    rules = json.dumps(walls(flower, [str(site[name]) for name in ("keys", "data", "home", "policy")]))
    command = [sys.executable, "-SE", str(SANDBOX), rules, str(os.getpid()), sys.executable, "-c", code]
    done = subprocess.run(
        command, env=bare(dict(os.environ), flower) | env, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr[-400:]


@pytest.mark.parametrize(
    "what", ["keys/key.pem", "keys/signing-key.pem", "data", "policy", "home/spool/sequence"]
)
def test_nothing_of_the_sites_can_be_opened(what: str, site: dict[str, Path]) -> None:
    name, _, below = what.partition("/")
    path = site[name] / below if below else site[name]
    assert path.is_file()
    for code in (
        f"open({str(path)!r}).read()",
        f"open({str(path)!r}, 'a')",
        f"import os; os.unlink({str(path)!r})",
        f"import os; os.listdir({str(path.parent)!r})",
        f"import subprocess; subprocess.run(['cat', {str(path)!r}], check=True)",
        f"import os; os.link({str(path)!r}, 'x')",
    ):
        said = inside(site, f"{code}; print('reached')")
        assert "reached" not in said and ("Permission" in said or "CalledProcessError" in said), (code, said)


def test_what_they_need_is_there(site: dict[str, Path]) -> None:
    """Flower, our two doors, names of the network, a folder of their own; and no way to become more."""
    flower = site["home"] / "flower"
    code = (
        "import flwr.clientapp, fedtune.flower.site_app, socket, tempfile, os; "
        "socket.getaddrinfo('localhost', 80); "
        f"open(os.path.join({str(flower)!r}, 'x'), 'w').write('x'); "
        f"tempfile.TemporaryFile().write(b'x'); open('/dev/null', 'w').write('x'); print('all there')"
    )
    assert inside(site, code) == "all there\n"
    assert "Permission" in inside(
        site, f"print(open('/proc/{os.getpid()}/environ').read())"
    )  # another program's variables, though of the same user
    status = inside(site, "print(open('/proc/self/status').read())")
    assert "NoNewPrivs:\t1" in status


def test_a_checkout_that_holds_keys_too_gives_its_own_files_only(
    site: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(site["keys"].parent))
    rules = walls(site["home"] / "flower", [str(site["keys"])])
    assert str(site["keys"].parent) in rules["list"] and str(site["keys"].parent) not in rules["read"]
    assert "reached" not in inside(site, f"open({str(site['keys'] / 'key.pem')!r}); print('reached')")
    assert restrict.__doc__
