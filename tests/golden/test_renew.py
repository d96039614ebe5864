"""What is renewed, what stays as it is stored, and which options are refused."""

import sys

import pytest

from tests.golden import renew, stored_runs
from tests.golden.renew import logits_to_store, parse


def test_logits_within_the_tolerance_stay(capsys: pytest.CaptureFixture[str]) -> None:
    logits = [0.1, 0.2]
    assert logits_to_store("logits", [0.1, 0.2 + 1e-6], logits) is logits
    for found in ([0.1], [0.1, 0.2, 0.3], [0.1, 0.2 + 1e-4], [0.1, float("nan")]):
        assert logits_to_store("logits", found, logits) is found
    assert "logits: CHANGED: 1 values, stored 2\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--store", "1"], "--store is '1'; it must be a number above"),
        (["--store", "abc"], "--store is 'abc'; it must be a number above"),
        (["--store", "0099"], "--store is '0099'; it must be a number above"),
        (["--store", ""], "--store is ''; it must be a number above"),
        (["--store", "99", "--compare"], "--store writes a run, and --compare writes nothing"),
    ],
)
def test_renew_refuses_a_run_that_it_cannot_store(
    options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parse(["--store", "99", "--only", "zero-3"]).store == "99"
    with pytest.raises(SystemExit):
        parse(options)
    assert f"error: {sentence}" in capsys.readouterr().err


def test_a_newly_stored_run_gets_its_expected_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With --only too, which selects what else is renewed."""
    stored, renewed = ["1"], []
    monkeypatch.setattr(sys, "argv", ["renew", "--store", "2", "--only", "zero-3"])
    monkeypatch.setattr(renew.launch, "fork_server", None)  # main sets it: set back at the end
    monkeypatch.setattr(renew, "ForkServer", lambda: None)
    monkeypatch.setattr(renew.os, "chdir", lambda _: None)
    monkeypatch.setattr(stored_runs, "names", lambda: stored)
    monkeypatch.setattr(stored_runs, "store_run", lambda _, out: stored.append(out.parent.name))
    monkeypatch.setattr(renew, "renew_curves", lambda layout, _: renewed.append(layout))
    monkeypatch.setattr(renew, "renew_expected", lambda run, _: renewed.append(run.name))
    assert renew.main() == 0
    assert renewed == ["zero-3", "2"]
