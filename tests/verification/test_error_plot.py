import errno
import sys
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from awq2marlin import CheckpointError, UnavailableError
from awq2marlin.gemm.check import GemmCheck, GemmRun
from awq2marlin.verification.error_plot import _figure, check_picture, depth_of, plot_errors


def gemm_check(name: str, relative: float) -> GemmCheck:
    return GemmCheck(name, 64, 64, "float16", (1,), max_error=9.0, mean_error=0.1, max_relative=relative, bound=0.5)


@pytest.mark.parametrize(
    ("module", "depth"),
    [("model.layers.7.mlp.up_proj", 7), ("layers.12", 12), ("experts.3.w1", 3), ("model.head", -1), ("a.b2.c", -1)],
)
def test_the_first_number_in_a_name_is_the_depth(module: str, depth: int) -> None:
    assert depth_of(module) == depth


def test_every_module_is_a_point_at_its_depth_and_part_of_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, list[tuple[float, float]]] = {}
    plot = Axes.plot

    def remember(axes: Axes, x: list[float], y: list[float], *args: object, **kwargs: object) -> object:
        drawn[str(kwargs["label"])] = list(zip(x, y, strict=True))
        return plot(axes, x, y, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", remember)
    checks = [gemm_check("m.10.up", 0.3), gemm_check("m.2.up", 0.1), gemm_check("m.2.down", 0.2)]
    plot_errors(GemmRun("cuda", "a device", tuple(checks)), tmp_path / "errors.png")
    assert drawn == {"down": [(2, 0.2)], "up": [(2, 0.1), (10, 0.3)]}


@pytest.mark.parametrize(("names", "ticks"), [(["m.0.up"], [0]), (["m.3.up", "m.4.up"], [3, 4]), (["head"], [-1])])
def test_layers_are_whole_numbers_however_few_there_are(names: list[str], ticks: list[int]) -> None:
    figure = _figure(GemmRun("cuda", "a device", tuple(gemm_check(name, 0.3) for name in names)))
    (axes,) = figure.axes
    first, last = axes.get_xlim()
    assert [each for each in axes.get_xticks() if first <= each <= last] == ticks


def test_the_file_is_a_picture(tmp_path: Path) -> None:
    plot_errors(GemmRun("cuda", "a device", (gemm_check("m.0.up", 0.3),)), tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_no_module_gives_an_empty_picture(tmp_path: Path) -> None:
    plot_errors(GemmRun("cpu", "CPU reference", ()), tmp_path / "errors.png")
    assert (tmp_path / "errors.png").is_file()


@pytest.mark.parametrize("name", ["errors", "errors.xyz", "errors.png.", ".png"])
def test_an_ending_that_names_no_picture_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"\.png") as raised:
        check_picture(tmp_path / name)
    assert raised.value.problems[0].code == "unknown-picture"
    with pytest.raises(CheckpointError):
        plot_errors(GemmRun("cuda", "a device", (gemm_check("m.0.up", 0.3),)), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_nothing_is_said_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnavailableError, match=r"pip install '\.\[plot\]'") as raised:
        check_picture(tmp_path / "errors.png")
    assert raised.value.problems[0].code == "no-matplotlib"


@pytest.mark.parametrize("name", ["errors.svg", "ERRORS.PNG", "errors.pdf"])
def test_other_endings_choose_another_format(tmp_path: Path, name: str) -> None:
    check_picture(tmp_path / name)
    plot_errors(GemmRun("cuda", "a device", (gemm_check("m.0.up", 0.3),)), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        check_picture(tmp_path / "nowhere" / "errors.png")


def test_a_picture_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = tmp_path / "errors.png"
    picture.write_bytes(b"the old one")

    def fail(_figure: Figure, file: object, **_options: object) -> None:
        Path(str(file)).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "no space", str(file))

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="no space") as caught:
        plot_errors(GemmRun("cuda", "a device", (gemm_check("m.0.up", 0.3),)), picture)
    assert caught.value.filename == str(picture)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"errors.png": b"the old one"}
