import json
import os

import numpy as np
import pytest
import safetensors
from hypothesis import given
from strategies import matrices
from support import assert_same_tensor, optional

from arcquant_ref import NVFP4Tensor, Selection, calibrate, dequantize, quantize, select
from arcquant_ref.tensor import written_whole


@pytest.fixture
def q():
    return quantize(np.random.default_rng(0).standard_normal((5, 48)))


def test_map_acts_on_codes_and_scales(q):
    rows = [3, 0]
    np.testing.assert_array_equal(dequantize(q.map(lambda a: a[rows])), dequantize(q)[rows])


def test_shape_and_bits(q):
    assert (q.shape, q.bits_per_value) == ((5, 48), 4.5)


@given(x=matrices())
def test_load_inverts_save(x, tmp_path_factory):
    path = tmp_path_factory.mktemp("tensor") / "q.safetensors"
    q = quantize(x)
    q.save(path)
    assert_same_tensor(NVFP4Tensor.load(path), q)


def test_file_has_the_documented_names_dtypes_and_direction(q, tmp_path):
    q.save(tmp_path / "q.safetensors")
    with safetensors.safe_open(tmp_path / "q.safetensors", framework="np") as file:
        assert file.metadata()["format"] == "nvfp4"
        assert "multiplies to decode" in file.metadata()["tensor_scale"]
        held = {
            name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape())
            for name in ("codes", "block_scales", "tensor_scale")
        }
    assert held == {
        "codes": ("U8", [5, 24]),
        "block_scales": ("F8_E4M3", [5, 3]),
        "tensor_scale": ("F32", []),
    }


def test_torch_reads_the_file_and_decodes_the_same_values(q, tmp_path):
    torch = optional("torch")
    from safetensors.torch import load_file

    q.save(tmp_path / "q.safetensors")
    file = load_file(tmp_path / "q.safetensors")
    assert file["block_scales"].dtype == torch.float8_e4m3fn
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    codes = torch.stack([file["codes"] & 15, file["codes"] >> 4], dim=-1).flatten(1)
    scales = file["block_scales"].float().repeat_interleave(16, dim=1)
    values = grid[codes.long()] * scales * file["tensor_scale"]
    np.testing.assert_array_equal(values.numpy(), dequantize(q))


def test_damaged_and_foreign_files_are_refused(q, tmp_path):
    path = tmp_path / "q.safetensors"
    q.save(path)
    whole = path.read_bytes()
    for damaged in (b"", b"PK\x03\x04", whole[:20], whole[:-1], whole + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged or not a safetensors file"):
            NVFP4Tensor.load(path)
    select(calibrate([np.ones((1, 16))])).save(path)
    with pytest.raises(ValueError, match="not an nvfp4 file of version 1: its format is 'nvfp4-selection'"):
        NVFP4Tensor.load(path)
    q.save(path)
    with pytest.raises(ValueError, match="not an nvfp4-selection file"):
        Selection.load(path)
    with pytest.raises(FileNotFoundError):
        NVFP4Tensor.load(tmp_path / "absent")


def edit_header(data: bytes, edit) -> bytes:
    """The safetensors file with its JSON header changed by `edit`."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    edit(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def test_contents_that_do_not_fit_are_refused(q, tmp_path):
    path = tmp_path / "q.safetensors"
    q.save(path)
    whole = path.read_bytes()
    for byte in (0x7F, 0xB8):
        bad = q.map(np.copy)
        bad.block_scales[1, 2] = byte
        with pytest.raises(ValueError, match=rf"NaN or carry a sign bit, .* {byte:#x} at index \(1, 2\)"):
            bad.save(path)
        path.write_bytes(whole.replace(q.block_scales.tobytes(), bad.block_scales.tobytes()))
        with pytest.raises(ValueError, match=rf"NaN or carry a sign bit, .* {byte:#x} at index \(1, 2\)"):
            NVFP4Tensor.load(path)
    edits = {
        "its version is '2'": lambda h: h["__metadata__"].update(version="2"),
        "holds .*'U8'.*; expected": lambda h: h["block_scales"].update(dtype="U8"),
        "holds .*; expected": lambda h: h.update(scales=h.pop("block_scales")),
        "needs? ": lambda h: h["block_scales"].update(shape=[3, 5]),
        "damaged": lambda h: h["codes"].update(shape=[5, 48]),
    }
    for message, edit in edits.items():
        path.write_bytes(edit_header(whole, edit))
        with pytest.raises(ValueError, match=message):
            NVFP4Tensor.load(path)


def test_selection_load_inverts_save_and_checks(tmp_path):
    selection = select(np.float32([3, 1] + [0.1] * 30))
    path = tmp_path / "s.safetensors"
    selection.save(path)
    loaded = Selection.load(path)
    np.testing.assert_array_equal(loaded.order, selection.order)
    np.testing.assert_array_equal(loaded.channel_amax, selection.channel_amax)
    assert loaded.num_residual == selection.num_residual == 16
    selection.order[:2] = 5
    selection.save(path)
    with pytest.raises(ValueError, match="not hold a valid selection: order is not a permutation"):
        Selection.load(path)


def test_only_a_regular_file_in_an_existing_folder_is_written(q, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe exists and is not a regular file"):
        q.save(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        q.save(tmp_path / "absent" / "q")
    (tmp_path / "real").write_text("before")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    q.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_same_tensor(NVFP4Tensor.load(tmp_path / "real"), q)


@pytest.mark.parametrize("problem", [KeyboardInterrupt, OSError])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, problem):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(problem), written_whole(path) as file:  # noqa: PT012
        file.write(b"half")
        raise problem
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_text() == "before"
