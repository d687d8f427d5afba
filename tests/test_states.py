"""What frozen layers make of texts: the same vectors as without the bank, kept on disk, never computed twice."""

import shutil
from pathlib import Path

import pytest
import torch
from test_encoder import TEXTS, assert_close, weighted

from repro import states
from repro.encoder import BiEncoder
from repro.states import StateBank, fingerprint


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts went through the frozen layers, one number a call."""
    calls: list[int] = []
    original = BiEncoder.keep_states

    def keep(self: BiEncoder, tokens, *args, **kwargs):  # noqa: ANN001, ANN002, ANN003, ANN202
        calls.append(len(tokens))
        return original(self, tokens, *args, **kwargs)

    monkeypatch.setattr(BiEncoder, "keep_states", keep)
    return calls


@pytest.mark.parametrize("layers", [2, 4])
def test_the_bank_gives_the_vectors_of_the_plain_path(layers: int, tiny_llama: Path) -> None:
    encoder = weighted(tiny_llama, projected=True)
    encoder.prompts["query"] = "why "
    encoder.freeze(layers)
    bank = StateBank(encoder, progress=False)
    bank.add(TEXTS[:3], "passage")
    bank.add([*TEXTS, TEXTS[0]], "passage")
    bank.add(TEXTS, "query")
    for kind in ("query", "passage"):
        order = [4, 0, 0, 2]
        assert_close(encoder.encode_tokens(bank([TEXTS[n] for n in order], kind)), encoder.encode(TEXTS, kind)[order])
    assert_close(encoder.encode_tokens(bank(["the moon of tea", TEXTS[1]], "query")), encoder.encode(["the moon of tea", TEXTS[1]], "query"))


def test_blocks_on_disk_are_read_and_a_stopped_run_goes_on(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "BLOCK", 2)
    encoder = weighted(tiny_llama, projected=True)
    encoder.freeze(4)
    calls = counted(monkeypatch)
    StateBank(encoder, tmp_path, progress=False).add(TEXTS, "passage")
    assert calls == [2, 2, 1]
    blocks = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    shutil.rmtree(blocks[0])
    encoder.projection.data.mul_(2)  # behind the pooled vectors: they stay valid
    bank = StateBank(encoder, tmp_path, progress=False)
    bank.add(TEXTS, "passage")
    assert len(calls) == 4
    assert_close(encoder.encode_tokens(bank(TEXTS, "passage")), encoder.encode(TEXTS))


def test_other_weights_pooling_lengths_and_prompts_have_other_names(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = weighted(tiny_llama, projected=True)
    prints = {fingerprint(encoder)}
    encoder.token_weights[3] += 1
    prints.add(fingerprint(encoder))
    encoder.max_length = 9
    prints.add(fingerprint(encoder))
    encoder.pooling = "cls"
    prints.add(fingerprint(encoder))
    with torch.no_grad():
        encoder.model.norm.weight[0] += 1
    prints.add(fingerprint(encoder))
    assert len(prints) == 5
    encoder.freeze(4)
    calls = counted(monkeypatch)
    for prompt in ("", "why ", ""):
        encoder.prompts["query"] = prompt
        StateBank(encoder, tmp_path, progress=False).add(["moon"], "query")
    assert calls == [1, 1]


def test_states_that_do_not_fit_are_computed_again(tiny_llama: Path, capsys: pytest.CaptureFixture) -> None:
    encoder = weighted(tiny_llama)
    encoder.freeze(2)
    bank = StateBank(encoder, state_gb=1e-9, progress=False)
    bank.add(TEXTS, "passage")
    assert "more than is left of the 1e-09 GB allowed" in capsys.readouterr().err
    assert bank(TEXTS, "passage").states is None
