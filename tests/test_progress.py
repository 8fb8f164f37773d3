"""Bars are for somebody who watches: one rule for all calls."""

import importlib
import inspect
import io
import pkgutil
import sys

import numpy as np
import pytest
import torch
from filled import fill, random_rows

import whence
from whence import errors
from whence.store.progress import bar, watched


def fit(**options):
    model = torch.nn.Linear(2, 2)
    data = [(torch.eye(2), torch.tensor([0, 1]))]
    return whence.fit_factors(
        model,
        data,
        lambda x, y: torch.nn.functional.cross_entropy(model(x), y),
        labels="empirical",
        **options,
    )


def retrain(**options):
    whence.evaluate.retrain(
        lambda places, seed: None, [[True, False]], 1, lambda model: [0.5], **options
    )


CALLS = {"fit_factors": fit, "retrain": retrain}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def public_calls():
    """Every function and class of whence that a user may call with `progress`."""
    for module in pkgutil.walk_packages(whence.__path__, "whence."):
        if module.name.rsplit(".", 1)[1].startswith("_"):
            continue
        for name, found in vars(importlib.import_module(module.name)).items():
            call = found.__init__ if inspect.isclass(found) else found
            is_ours = getattr(found, "__module__", None) == module.name
            if is_ours and inspect.isfunction(call) and not name.startswith("_"):
                parameters = inspect.signature(call).parameters
                if "progress" in parameters:
                    yield f"{module.name}.{name}", parameters["progress"]


def test_every_call_takes_progress_in_the_same_way():
    calls = {
        name: parameter
        for name, parameter in public_calls()
        if not name.startswith("whence.store.progress.")
    }
    assert {"whence.curvature.fit.fit_factors", "whence.store.lifecycle.compact"} <= set(calls)
    assert {parameter.default for parameter in calls.values()} == {None}
    assert {parameter.annotation for parameter in calls.values()} == {"bool | None"}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_nothing_is_shown_in_a_log_file(monkeypatch, call):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    call()
    assert sys.stderr.getvalue() == ""


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("kind", "progress"), [(Terminal, None), (io.StringIO, True)])
def test_bars_are_shown_on_a_terminal_and_where_asked_for(monkeypatch, call, kind, progress):
    monkeypatch.setattr(sys, "stderr", kind())
    call(progress=progress)
    assert "100%" in sys.stderr.getvalue()


def test_progress_of_another_type_is_refused_before_any_work(tmp_path):
    fill(tmp_path / "s", random_rows(2))
    for call in (*CALLS.values(), lambda **options: whence.compact(tmp_path / "s", **options)):
        with pytest.raises(errors.DtypeError, match="progress must be a bool or None, got 1"):
            call(progress=1)
        call(progress=np.bool_(False))


def test_a_name_writes_no_command_to_the_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    model = torch.nn.Linear(2, 2)
    name = "\x1b[31mred\x1b]0;title\x07"
    whence.fit_factors(
        model,
        [(torch.eye(2), torch.tensor([0, 1]))],
        lambda x, y: torch.nn.functional.cross_entropy(model(x), y),
        labels="empirical",
        states={name: model.state_dict()},
    )
    shown = list(watched([1], f"{name}: residuals", None, "batch"))
    with bar(name, 1, None) as moved:
        moved.update(1)
    assert shown == [1]
    assert "red" in sys.stderr.getvalue()
    assert name not in sys.stderr.getvalue()
    assert "\x07" not in sys.stderr.getvalue()
