"""What a program's settings take, from wherever it is written, and how it is told what they do not."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from msgspec import Meta
from ngpu import settings
from ngpu.settings import Secret, Settings, SettingsFault


class Demo(Settings, frozen=True, kw_only=True):
    """Settings of a demonstration."""

    name: str = "demo"
    """Its name."""
    wait: Annotated[float, settings.duration, Meta(ge=1, le=3600)] = 5.0
    """How long
    it waits."""
    room: Annotated[int, settings.size, Meta(gt=0)] = 1024
    """How much it takes."""
    count: int = 1
    """How many."""
    loud: bool = False
    """Whether it is heard."""
    code: Literal[200, 100] = 200
    """What it answers."""
    there: Annotated[str, settings.address] = "127.0.0.1:80"
    """Where it is."""
    source: Annotated[Path | None, settings.readable] = None
    """What it reads."""
    tags: Annotated[tuple[str, ...], settings.words] = ("a", "b")
    """What it is called."""
    key: Secret = Secret()
    """What opens it."""

    def faults(self) -> list[str]:
        """See Settings."""
        return ["loud demos have another name"] if self.loud and self.name == "demo" else []


def load(file: Path | None = None, **options: Any) -> Demo:
    return settings.load(Demo, prefix="NGPU_DEMO_", file=file, options=options, listed_by="demo --settings")


WRITTEN = [
    ("wait", "2m", 120.0),
    ("wait", "1h", 3600.0),
    ("wait", "1m 30s", 90.0),
    ("wait", "1500ms", 1.5),
    ("wait", "7", 7.0),
    ("room", "64 MiB", 64 * 2**20),
    ("room", "2G", 2 * 2**30),
    ("room", "12", 12),
    ("count", "12", 12),
    *(("loud", yes, True) for yes in ("1", "true", "Yes", "ON")),
    *(("loud", no, False) for no in ("0", "false", "No", "off")),
    ("code", "100", 100),
    ("there", "[::1]:0", "[::1]:0"),
    ("source", __file__, Path(__file__)),
    ("tags", "x, y,,z", ("x", "y", "z")),
    ("tags", "", ()),
]


@pytest.mark.parametrize(("name", "written", "meant"), WRITTEN)
def test_what_is_written_is_understood_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, written: str, meant: object
) -> None:
    file = tmp_path / "demo.toml"
    file.write_text(f'{name} = {json.dumps(written)}\nname = "another"')
    assert getattr(load(file), name) == meant
    options: dict[str, Any] = {"name": "another", name: written}
    assert getattr(load(**options), name) == meant
    for option, value in options.items():
        monkeypatch.setenv(f"NGPU_DEMO_{option.upper()}", value)
    assert getattr(load(), name) == meant


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("wait = 0.5", "wait: expected float >= 1.0"),
        ('wait = "2h"', "wait: expected float <= 3600.0"),
        ('wait = "soon"', "wait: 'soon' is no duration: write 15s"),
        ("wait = [1]", "wait: expected float, got array"),
        ("wait = nan", "wait: expected float"),
        ('room = "much"', "room: 'much' is no size: write 1048576, 64MiB"),
        ("room = 0", "room: expected int >= 1"),
        ("room = 1.5", "room: expected int, got float"),
        ('count = "one"', "count: expected int, got str"),
        ('loud = "perhaps"', "loud: 'perhaps' is neither true nor false"),
        ("code = 201", "code: 201 is none of 200, 100"),
        ('there = "nowhere"', "there: 'nowhere' is no HOST:PORT"),
        ('there = "::1:80"', "goes in brackets"),
        ("there = 80", "there: expected str, got int"),
        ("there = {host = 1}", "there: expected str, got object"),
        ('source = "/not/there"', "source: /not/there cannot be read"),
        ("source = 5", "source: 5 is no text"),
        ("tags = [1]", "tags: expected str, got int - at $[0]"),
        ("tags = 1", "tags: expected array, got int"),
        ("colour = 1", "colour: there is no such setting (see `demo --settings`)"),
        ("loud = true", "loud demos have another name"),
        ("loud =", "demo.toml: Invalid value"),
    ],
)
def test_what_cannot_be_is_refused_in_words(tmp_path: Path, toml: str, words: str) -> None:
    file = tmp_path / "demo.toml"
    file.write_text(toml)
    with pytest.raises(SettingsFault) as refused:
        load(file)
    assert words in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "demo.toml"
    file.write_bytes(b'name = "\xff"')
    with pytest.raises(SettingsFault, match=r"demo\.toml: "):
        load(file)


def test_secrets_are_not_shown() -> None:
    demo = load(key="sesame")
    assert demo.key.text == "sesame"
    assert "sesame" not in f"{demo!r} {demo}"


def test_all_are_listed_with_default_and_meaning() -> None:
    rows = {name: (default, meaning) for name, default, meaning in settings.table(Demo)}
    assert tuple(rows) == Demo.__struct_fields__
    assert rows["wait"] == ("5.0", "How long it waits.")
    assert (rows["tags"][0], rows["key"][0], rows["source"][0]) == ("a,b", "", "")
