"""The pictures of docs/kernels.md show what the interpreter does; here that is compared with the PTX ISA."""

import numpy as np
import pytest

from gpu import plots


def test_lanes_and_registers_are_those_of_the_ptx_isa():
    """Sections on matrix fragments of mma.m16n8k64 and on its scales, thread-id 0."""
    row, column = np.arange(16)[:, None], np.arange(8)[:, None]
    k, n, block = np.arange(64), np.arange(8), np.arange(4)

    def ids(lane, register, part, count, parts):
        return (lane * count + register) * parts + part

    of_a = ids(row % 8 * 4 + k % 32 // 8, row // 8 + 2 * (k // 32), k % 8, 4, 8)
    of_b = ids(column * 4 + k % 32 // 8, k // 32, k % 8, 2, 8)
    of_d = ids(row % 8 * 4 + n // 2, n % 2 + 2 * (row // 8), 0, 4, 1)
    of_scales = ids(row % 8 * 4 + row // 8, 0, block, 1, 4), ids(column * 4, 0, block, 1, 4)
    expected = {
        "A": of_a,
        "B": of_b,
        "C and D": of_d,
        "scales of A": of_scales[0],
        "scales of B": of_scales[1],
    }
    found = plots.fragments()
    assert found.keys() == expected.keys()
    for name, (got, _, _) in found.items():
        np.testing.assert_array_equal(got, expected[name], name)


@pytest.mark.parametrize(("rows", "columns"), [(128, 4), (256, 12)])
def test_bytes_of_tiles_are_those_of_the_specification(rows, columns):
    row, s = np.divmod(plots.swizzled(rows, columns), columns)
    tile, row, s = row // 128 * (columns // 4) + s // 4, row % 128, s % 4
    np.testing.assert_array_equal(tile * 512 + row % 32 * 16 + row // 32 * 4 + s, np.arange(rows * columns))


def test_both_pictures_are_written(tmp_path, capsys):
    assert plots.main(["-o", str(tmp_path)]) == 0
    for name in ("fragments.png", "swizzle.png"):
        body = (tmp_path / name).read_bytes()
        assert body.startswith(b"\x89PNG")
        assert len(body) < 300_000
    assert plots.main(["-o", str(tmp_path / "none")]) == 2
    assert "none is not a folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plots.main([])
