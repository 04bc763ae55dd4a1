"""The GPU benchmark, run on the CPU so that it cannot rot: NumPy and PyTorch side by side on small shapes."""

import sys

import bench_gpu
import pytest

DEVICES = ("--devices", "cpu", "torch:cpu")
SMALL = ("--weights", "20_000", "--rows", "4", "8")


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *arguments])
    bench_gpu.main()


def test_it_measures_each_shape_on_each_device_and_writes_a_document(monkeypatch, tmp_path, capsys):
    output = tmp_path / "gpu.md"
    run(monkeypatch, *DEVICES, *SMALL, "--output", str(output))
    document = output.read_text()
    assert document == capsys.readouterr().out
    assert "failed" not in document
    assert "skipped" not in document
    rows = [
        dict(zip(bench_gpu.COLUMNS, (cell.strip() for cell in line.strip("|").split("|")), strict=True))
        for line in document.splitlines()
        if line.startswith("| 2")
    ]
    measured = [(row["d"], row["m"], row["window"], row["device"]) for row in rows]
    assert measured == [
        (d, m, window, device)
        for d, window in (("200", "host"), ("20,000", "device"), ("20,000", "host"))
        for m in ("4", "8")
        for device in ("numpy:cpu", "torch:cpu")
    ]
    assert all(
        int(row["differ"]) <= 1e-3 * int(row["d"].replace(",", "")) for row in rows
    )  # rounding near the threshold
    assert all(float(row[part]) > 0 for row in rows for part in ("step", "diagonal", "mask", "update", "floor ratio"))


def test_a_window_of_torch_is_read_by_numpy_in_the_same_memory():
    numpy, torch = (bench_gpu.resolve_device(name) for name in ("cpu", "torch:cpu"))
    window = bench_gpu.filled_window(bench_gpu.Shape(3000, 2, "device"), [torch, numpy])
    seen = bench_gpu.seen_by(numpy, window)
    (chunk, *_), (original, *_) = (each.chunks(each.stored_groups[0]) for each in (seen, window))
    original[0, 0, 0] = 7
    assert chunk[0, 0, 0] == 7
    assert seen.to_rows().shape == (2, 3000)


@pytest.mark.parametrize(
    ("setting", "value", "arguments", "reason"),
    [("LAYER", 10_000, ("--seconds", "0"), "seconds"), ("HOST_RESERVE", 10**18, ("--seconds", "60"), "GiB")],
)
def test_what_takes_too_long_or_does_not_fit_is_skipped_by_name(monkeypatch, capsys, setting, value, arguments, reason):
    monkeypatch.setattr(bench_gpu, setting, value)
    run(monkeypatch, *DEVICES, *SMALL, *arguments)
    skipped = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert len(skipped) == 2 + 2 * (1 + (reason == "seconds"))
    assert all(line.startswith("| 2") and reason in line for line in skipped)


def test_a_failure_is_named_and_ends_no_other_measurement(monkeypatch, capsys):
    step = bench_gpu.Run.step

    def fails(self):
        if self._window.count == 4:
            raise RuntimeError("out | of\nmemory")
        return step(self)

    monkeypatch.setattr(bench_gpu.Run, "step", fails)
    run(monkeypatch, *DEVICES, *SMALL)
    document = capsys.readouterr().out
    assert document.count("failed: RuntimeError: out / of |") == 3
    assert document.count("torch:cpu") == 1 + 3 + 1


def test_without_a_gpu_it_says_what_is_missing(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch)
    assert "device 'cupy:cuda:0'" in capsys.readouterr().err
