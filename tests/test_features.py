"""What the frozen model computed, in memory and on disk."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from hf_malmen.batches import TokenSequence
from hf_malmen.features import FeatureCache, FeatureFolder, Key, features_fingerprint, sequence_key

CPU = torch.device("cpu")


def key_of(number: int, kind: str = "trace") -> Key:
    """A key of a sequence of its own."""
    return sequence_key(kind, TokenSequence((number, 7), (-100, 3)))


def tensors_of(number: int) -> tuple[Tensor, ...]:
    """Two tensors, of 40 bytes, with values of their own."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(3, 2, generator=generator), torch.randn(8, generator=generator).to(torch.bfloat16)


def assert_found(cache: FeatureCache | FeatureFolder, number: int) -> None:
    """The entry is there, bit for bit, in its dtypes."""
    found = cache.get(key_of(number), CPU) if isinstance(cache, FeatureCache) else cache.get(key_of(number))
    assert found is not None
    for tensor, expected in zip(found, tensors_of(number), strict=True):
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)


def filled(folder: Path, numbers: range, fingerprint: str = "a" * 64, max_bytes: int = 10**6) -> FeatureFolder:
    """A folder to which entries were written, as one file."""
    features = FeatureFolder(folder, max_bytes, fingerprint)
    for number in numbers:
        features.put(key_of(number), tensors_of(number))
    features.flush()
    return features


def test_memory_forgets_the_oldest_first_and_nothing_that_is_needed() -> None:
    """A limit of two entries and a half: two stay, the newest, or those of the step."""
    cache = FeatureCache(100)
    for number in range(4):
        cache.put(key_of(number), tensors_of(number))
    cache.make_room(protect={key_of(0)})
    assert [cache.get(key_of(number), CPU) is not None for number in range(4)] == [True, False, False, True]
    cache.put(key_of(3), tensors_of(3))  # replaced, not counted twice
    cache.make_room(protect=set())
    assert_found(cache, 0)
    assert_found(cache, 3)
    assert cache.get(key_of(0, "answer"), CPU) is None
    cache.clear()
    assert cache.get(key_of(0), CPU) is None


def test_keys_tell_the_answer_and_the_decoder_apart() -> None:
    """What is traced depends on both."""
    ids, labels = (1, 2), (-100, 3)
    sequences = [
        TokenSequence(ids, labels), TokenSequence(ids, (3, -100)), TokenSequence(ids, labels, (0,)),
        TokenSequence(ids, labels, (1,)),
    ]  # fmt: skip
    assert len({sequence_key("trace", sequence) for sequence in sequences}) == 4


def test_folder_outlives_the_process_and_is_shared(tmp_path: Path) -> None:
    """Two writers, each with a file of its own; a third reads both; memory that is cleared reads the disk again."""
    filled(tmp_path, range(2))
    cache = FeatureCache(0, filled(tmp_path, range(1, 3)))  # the second entry is there already
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert len(list(tmp_path.iterdir())) == 2
    for _ in range(2):
        for number in range(3):
            assert_found(cache, number)
        cache.clear()
    cache.put(key_of(5), tensors_of(5))
    cache.make_room(protect=set())
    assert_found(FeatureFolder(tmp_path, 10**6, "a" * 64), 5)


def test_each_entry_is_written_once(tmp_path: Path) -> None:
    """What an earlier run has written is not written again."""
    filled(tmp_path, range(2))
    filled(tmp_path, range(1, 3))
    names = []
    for path in tmp_path.iterdir():
        with safe_open(path, framework="pt") as file:
            names += list(file.keys())
    assert len(names) == len(set(names)) == 2 * 3


def test_folder_stops_at_its_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is written beyond it, files of earlier runs counted; what is there is still read."""
    size = sum(path.stat().st_size for path in [*filled(tmp_path, range(2)).folder.iterdir()])
    with caplog.at_level("INFO", logger="hf_malmen.features"):
        features = filled(tmp_path, range(2, 9), max_bytes=size + 50)
    assert "limit" in caplog.text
    assert len(list(tmp_path.iterdir())) == 1
    assert features.get(key_of(2)) is None
    assert_found(features, 1)


def test_the_limit_is_that_of_all_who_write(tmp_path: Path) -> None:
    """Also of processes that write in turns, and of what one of them has not finished."""
    (one,) = filled(tmp_path / "one", range(1)).folder.iterdir()
    limit = 4 * one.stat().st_size
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "of another.unfinished").write_bytes(bytes(limit // 4))
    writers = [FeatureFolder(tmp_path / "all", limit, "a" * 64) for _ in range(3)]
    for number in range(9):
        writers[number % 3].put(key_of(number), tensors_of(number))
        writers[number % 3].flush()
    assert sum(path.stat().st_size for path in (tmp_path / "all").iterdir()) <= limit
    assert len(list((tmp_path / "all").glob("*.safetensors"))) == 3


def test_what_a_killed_process_left_unfinished_is_removed(tmp_path: Path) -> None:
    """After a day; until then somebody may be writing it."""
    old, new = tmp_path / "old.unfinished", tmp_path / "new.unfinished"
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    FeatureFolder(tmp_path, 10**6, "a" * 64)
    assert list(tmp_path.iterdir()) == [new]


def test_a_folder_that_cannot_be_written_to_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is optional: said once, and what it holds is still read."""
    features = filled(tmp_path / "features", range(1))
    (tmp_path / "features").rename(tmp_path / "elsewhere")
    with caplog.at_level("WARNING", logger="hf_malmen.features"):
        for number in (1, 2):
            features.put(key_of(number), tensors_of(number))
            features.flush()
    assert len(caplog.records) == 1
    assert "Nothing more is added" in caplog.text
    (tmp_path / "elsewhere").rename(tmp_path / "features")
    assert_found(features, 0)


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    """The error names it, and what to do."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=rf"trunk_cache_dir is '{re.escape(str(path))}'.*expected a folder"):
            FeatureFolder(path, 10**6, "a" * 64)


@pytest.mark.parametrize("metadata", [{}, {"checksums": "not JSON"}, {"checksums": "[]"}])
def test_a_file_that_does_not_say_what_it_holds(
    tmp_path: Path, metadata: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """Reported and not used, though its format and fingerprint are right."""
    metadata = {"format": "hf_malmen features 1", "fingerprint": "a" * 64} | metadata
    save_file({"x.0": torch.zeros(2)}, tmp_path / "odd.safetensors", metadata=metadata)
    with caplog.at_level("WARNING", logger="hf_malmen.features"):
        filled(tmp_path, range(1))
    assert "odd.safetensors is damaged (it does not say what it holds)" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "flipped", "no safetensors"])
def test_damaged_file_is_reported_and_not_used(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    """Cut short, a bit flipped in its values, or something else under that name: computed again, into a new file."""
    filled(tmp_path, range(2))
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-1] ^= 1
    path.write_bytes(
        b"not a checkpoint" if damage == "no safetensors" else content[:-5] if damage == "cut" else content
    )
    with caplog.at_level("WARNING", logger="hf_malmen.features"):
        features = FeatureFolder(tmp_path, 10**6, "a" * 64)
        lost = [number for number in range(2) if features.get(key_of(number)) is None]
    assert lost
    assert path.name in caplog.text
    assert "damaged" in caplog.text
    for number in lost:
        features.put(key_of(number), tensors_of(number))
    features.flush()
    for number in range(2):
        assert_found(FeatureFolder(tmp_path, 10**6, "a" * 64), number)


def test_files_of_another_model_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another fingerprint's entries, and files that are no features at all, are neither read nor changed."""
    filled(tmp_path, range(2))
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    with caplog.at_level("INFO", logger="hf_malmen.features"):
        other = FeatureFolder(tmp_path, 10**6, "b" * 64)
    assert "another model" in caplog.text
    assert other.get(key_of(0)) is None
    assert path.read_bytes() == content


def test_fingerprint_sees_every_weight_and_setting(make_llama: Callable[..., PreTrainedModel]) -> None:
    """One bit of any weight, the dtype, the configuration or a setting changes it; where it came from does not."""
    model = make_llama()
    before = features_fingerprint(model, ["a"], "answer")
    model.config._name_or_path = "elsewhere"
    assert features_fingerprint(make_llama(), ["a"], "answer") == features_fingerprint(model, ["a"], "answer") == before
    assert features_fingerprint(model, ["b"], "answer") != before
    assert features_fingerprint(make_llama(torch.bfloat16), ["a"], "answer") != before
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.up_proj").weight[3, 2] *= 1 + 2**-20
    assert features_fingerprint(model, ["a"], "answer") != before
    rescaled = make_llama()
    rescaled.config.rms_norm_eps = 1e-3
    assert features_fingerprint(rescaled, ["a"], "answer") != before


def test_fingerprint_sees_the_state_of_adapters(make_llama: Callable[..., PreTrainedModel]) -> None:
    """Which are active, whether they are switched off or merged, and their scales; put back, it is as it was."""
    model = make_llama()
    for name in ("first", "second"):
        model.add_adapter(LoraConfig(target_modules=["up_proj"], init_lora_weights=False), name)

    def digest() -> str:
        return features_fingerprint(model, ["a"], "answer")

    layer: Any = model.get_submodule("model.layers.0.mlp.up_proj")
    model.set_adapter("first")
    found = [digest()]
    model.set_adapter("second")
    found.append(digest())
    model.disable_adapters()
    found.append(digest())
    model.enable_adapters()
    layer.scaling["second"] *= 2
    found.append(digest())
    layer.scaling["second"] /= 2
    model.set_adapter("second")
    assert digest() == found[1]
    weight = layer.weight.detach().clone()
    layer.merge()
    layer.weight.data.copy_(weight)  # so that nothing but the flag says it
    found.append(digest())
    assert len(set(found)) == 5


def test_fingerprint_of_offloaded_weights_is_refused(make_llama: Callable[..., PreTrainedModel]) -> None:
    """They cannot be told from others."""
    with pytest.raises(ValueError, match="trunk_cache_dir"):
        features_fingerprint(make_llama().to("meta"), ["a"], "answer")
