"""safetensors written one tensor at a time: what safetensors itself writes, byte for byte."""

import json
import re
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tca_fast.errors import UserError
from tca_fast.formats import tensor_files
from tca_fast.formats.tensor_files import Entry, Header, read_headers, read_tensor, write_tensors

CODES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}


def entries(tensors):
    return [
        Entry(key, Header(tuple(t.shape), CODES[t.dtype]), lambda tensor=t: tensor)
        for key, t in tensors.items()
    ]


def several(dtype):
    names = ["b", "a.é", "a.10", "a.9"]
    shapes = [(3, 5), (4,), (2, 3, 1), (0, 7)]
    return {n: (torch.randn(s) * 3).to(dtype) for n, s in zip(names, shapes, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_bytes_are_those_of_save_file(tmp_path, dtype):
    tensors = several(dtype)
    write_tensors(tmp_path / "ours", entries(tensors))
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_dtypes_of_every_width_stand_aligned_in_one_file(tmp_path):
    tensors = {
        "half": torch.randn(3).bfloat16(),
        "double": torch.randn(2).double(),
        "whole": torch.arange(3),
        "single": torch.randn(5),
    }
    write_tensors(tmp_path / "file", entries(tensors))
    content = (tmp_path / "file").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    fields = json.loads(content[8:start])
    for key, tensor in tensors.items():
        assert (start + fields[key]["data_offsets"][0]) % tensor.itemsize == 0
    loaded = load_file(tmp_path / "file")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in tensors.items())


def test_a_tensor_is_read_only_when_its_turn_comes(tmp_path):
    alive, most = 0, 0

    def release():
        nonlocal alive
        alive -= 1

    def read():
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        array = np.ones(3, dtype=np.float32)
        weakref.finalize(array, release)  # the tensor's memory is the array's
        return torch.from_numpy(array)

    write_tensors(tmp_path / "file", [Entry(f"{i}", Header((3,), "F32"), read) for i in range(5)])
    assert most <= 2  # the one being written, and the next before the last is let go


def test_headers_and_single_tensors(tmp_path):
    save_file({"x": torch.ones(2, 3), "y": torch.zeros(4).half()}, tmp_path / "file")
    headers = read_headers(tmp_path / "file")
    assert headers == {"x": Header((2, 3), "F32"), "y": Header((4,), "F16")}
    assert (headers["x"].dtype, headers["x"].num_bytes) == ("float32", 24)
    assert torch.equal(read_tensor(tmp_path / "file", "x"), torch.ones(2, 3))


def test_a_disk_that_loses_bytes_is_noticed(tmp_path, monkeypatch):
    path = tmp_path / "file"
    written = tensor_files._checksum

    def spoil(file):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        return written(file)

    monkeypatch.setattr(tensor_files, "_checksum", spoil)
    with pytest.raises(UserError, match="reads back otherwise than written"):
        write_tensors(path, entries({"x": torch.ones(3)}))


def test_a_tensor_of_another_shape_than_said_is_refused(tmp_path):
    entry = Entry("x", Header((2,), "F32"), lambda: torch.ones(3))
    with pytest.raises(UserError, match=re.escape("x: has shape [3], its file said [2]")):
        write_tensors(tmp_path / "file", [entry])


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_what_is_no_safetensors_file_is_one_line(tmp_path, content):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    for action in (lambda: read_headers(path), lambda: read_tensor(path, "x")):
        expected = "is missing" if content is None else "not a whole safetensors file"
        with pytest.raises(UserError, match=expected) as caught:
            action()
        assert "\n" not in str(caught.value)
