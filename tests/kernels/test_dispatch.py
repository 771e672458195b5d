"""Choice, refusal and explanation of backends."""

import pytest
import torch

from hotloop.kernels import dispatch
from hotloop.kernels.dispatch import Backend, BackendError, Table, explain, forced_backend, use_backend


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Table:
    monkeypatch.setattr(dispatch, "_tables", {})
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    return Table(
        "halve",
        Backend(
            "fast", lambda x: None if x.shape[0] % 4 == 0 else f"length {x.shape[0]} is no multiple of 4", torch.neg
        ),
        Backend("general", lambda x: None if x.dtype == torch.float32 else f"dtype {x.dtype}", torch.neg),
    )


def test_first_backend_that_serves(table: Table):
    assert table.choose(torch.zeros(8)).name == "fast"
    assert table.choose(torch.zeros(7)).name == "general"


def test_none_serves(table: Table):
    with pytest.raises(BackendError, match=r"(?s)halve.*length 7 is no multiple of 4.*dtype torch.int64"):
        table.choose(torch.zeros(7, dtype=torch.int64))


def test_forced_backend_is_used_or_refused_with_the_reason(table: Table):
    with use_backend("general"):
        assert table.choose(torch.zeros(8)).name == "general"
        with use_backend("fast"), pytest.raises(BackendError, match="length 7 is no multiple of 4"):
            table.choose(torch.zeros(7))
        with use_backend(None):
            assert table.choose(torch.zeros(8)).name == "fast"
        assert forced_backend() == "general"
    assert forced_backend() is None
    with use_backend("cuda"), pytest.raises(BackendError, match="only fast, general"):
        table.choose(torch.zeros(8))


def test_use_backend_ends_with_an_error(table: Table):
    with pytest.raises(ZeroDivisionError), use_backend("general"):
        raise ZeroDivisionError
    assert forced_backend() is None


def test_environment_variable_yields_to_the_context(table: Table, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "general")
    assert table.choose(torch.zeros(8)).name == "general"
    with use_backend("fast"):
        assert table.choose(torch.zeros(8)).name == "fast"
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "")
    assert table.choose(torch.zeros(8)).name == "fast"


def test_explain(table: Table):
    text = explain("halve", torch.zeros(7))
    assert text.splitlines() == ["halve", "    fast       length 7 is no multiple of 4", "  * general    serves"]
    assert explain(table, torch.zeros(7)) == text
    with use_backend("fast"):
        lines = explain("halve", torch.zeros(7)).splitlines()
    assert lines[0] == "backend 'fast' is forced by use_backend or HOTLOOP_BACKEND"
    assert not any(line.startswith("  *") for line in lines)  # what is forced doesn't serve, so nothing is chosen


def test_explain_takes_all_tables_of_an_op(table: Table):
    Table("norm.rows", table["general"])
    Table("norm.columns", table["fast"])
    Table("normal", table["fast"])
    lines = explain("norm", torch.zeros(4)).splitlines()
    assert [line for line in lines if not line.startswith(" ")] == ["norm.rows", "norm.columns"]
    with pytest.raises(BackendError, match=r"'nrom' \(known: halve, norm.columns, norm.rows, normal\)"):
        explain("nrom")


def test_a_compiled_function_follows_use_backend(table: Table):
    torch._dynamo.reset()

    def f(x: torch.Tensor) -> torch.Tensor:
        return x + (1.0 if table.choose(x).name == "fast" else 2.0)

    compiled = torch.compile(f, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(8))[0] == 1
    with use_backend("general"):
        assert compiled(torch.zeros(8))[0] == 2
    assert compiled(torch.zeros(8))[0] == 1


def test_the_environment_is_read_when_a_function_is_compiled(table: Table, monkeypatch: pytest.MonkeyPatch):
    torch._dynamo.reset()
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "general")
    compiled = torch.compile(
        lambda x: x + (1.0 if table.choose(x).name == "fast" else 2.0), fullgraph=True, backend="eager"
    )
    assert compiled(torch.zeros(8))[0] == 2
