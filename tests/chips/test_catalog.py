import math
import re
import tomllib
from importlib.resources import files

import pytest

from zili.chips import catalog, find_backend, find_chip, registry
from zili.chips.catalog import CONFIDENCE, Figures, identify, read_catalog
from zili.errors import ChipError

CHIPS = list(catalog().values())


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_every_chip_is_complete_in_what_it_claims(chip):
    figures = {name: figure for name, figure in chip.figures().items() if figure}
    assert figures
    assert chip.source
    for figure in figures.values():
        assert figure.value > 0
        assert math.isfinite(figure.value)
        assert figure.confidence in CONFIDENCE
    if chip.backend:
        assert find_backend(chip.backend).name == chip.backend


def test_the_planned_vendors_are_there():
    assert {chip.backend for chip in CHIPS} >= {"ascend", "cambricon", "nvidia", None}
    assert all(
        backend.name == "cpu" or any(c.backend == backend.name for c in CHIPS) for backend in registry().backends
    )


def test_what_is_not_published_is_absent():
    mlu590 = find_chip("mlu590")
    compute = [name for name in Figures.model_fields if name.endswith(("tflops", "tops"))]
    assert compute
    assert all(mlu590.figure(name) is None for name in compute)
    with pytest.raises(ChipError, match=r"bf16_tflops of mlu590 is not published"):
        mlu590.require("bf16_tflops")
    assert find_chip("910a").bf16_tflops is None


def test_variants_of_the_mlu590_are_as_users_report_them():
    """98,304 MiB a card, eight a node; a driver's name of one is not the other's."""
    m9, m9d = identify("MLU590-M9"), identify("MLU590-M9D")
    assert m9 is not None and m9d is not None
    assert (m9.memory_gb, m9.chips_per_node, m9d.memory_gb) == (98_304 / 1024, 8, 80)
    assert m9.bf16_tflops is None and "users" in m9.source and m9.figure("memory_gb").confidence == "M"


@pytest.mark.parametrize(
    ("name", "cores", "gigahertz"),
    [("910b1", 24, 1.85), ("910b2", 24, 1.8), ("910b3", 20, 1.8), ("910b4", 20, 1.5), ("950pr", 32, 1.65)],
)
def test_ascend_peaks_are_the_cube_units_alone(name, cores, gigahertz):
    # 16 x 16 x 16 multiply-adds a core and cycle; the 950 doubles what it does with 8 bits, not with 16.
    assert find_chip(name).require("bf16_tflops") == pytest.approx(8192 * cores * gigahertz / 1e3, rel=2e-3)


def test_910b2_and_910c():
    assert find_chip("910b2").bf16_tflops == 353.9
    assert find_chip("910c").require("bf16_tflops") == pytest.approx(2 * 353.9)


@pytest.mark.parametrize("chip", [c for c in CHIPS if c.bf16_tflops and c.int8_tops], ids=lambda chip: chip.name)
def test_int8_is_about_twice_16_bit(chip):
    ratio = chip.require("int8_tops") / chip.require("bf16_tflops")
    assert ratio == pytest.approx(8 / 3 if chip.name == "mlu370-x8" else 2, rel=0.01)


@pytest.mark.parametrize("name", ["910b2", "Ascend-910B2", "Ascend910B2", "ascend 910b2"])
def test_a_chip_by_any_of_its_names(name):
    assert find_chip(name).name == "ascend-910b2"


def test_names_that_are_only_near_do_not_count():
    assert identify("NVIDIA H100 80GB HBM3").name == "h100-sxm"
    assert identify("NVIDIA H100 PCIe") is None
    assert identify("Ascend910B2C") is None
    with pytest.raises(ChipError, match="no chip is named '910b9'; did you mean 910b"):
        find_chip("910b9")


def test_models_that_differ_from_their_backend():
    overrides = {chip.name: {key: o.value for key, o in chip.overrides().items()} for chip in CHIPS}
    assert overrides["ascend-910a"]["bf16"] is False
    assert overrides["ascend-910a"]["inf_nan"] is False
    assert overrides["ascend-950dt"] == {"fsdp2": False}
    assert not overrides["ascend-910b2"]


GOOD = 'vendor = "V"\nconfidence = "M"\nsource = "a page of the vendor"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[x", "faulty"),
        (f"[x]\n{GOOD}watts = 0", "greater than 0"),
        (f"[x]\n{GOOD}bf16_gflops = 5", "bf16_gflops"),
        (f"[x]\n{GOOD}watts = 5\nfigure_confidence = {{ memory_gb = 'L' }}", "no such figure: .'memory_gb'"),
        (f"[x]\n{GOOD}[x.capabilities]\nbf61 = {{ value = true, reason = 'r' }}", "no such capability: .'bf61'"),
        ('[x]\nvendor = "V"\nconfidence = "M"', "source"),
        ('[x]\nvendor = "V"\nconfidence = "sure"\nsource = "a page of the vendor"', "confidence"),
        (f"[x-1]\n{GOOD}[y]\n{GOOD}aliases = ['X1']", "to x-1 and to y"),
    ],
)
def test_a_faulty_catalog_is_refused(text, message):
    with pytest.raises(ChipError, match=message):
        read_catalog(text)


def test_a_good_one_is_read():
    chip = read_catalog(f"[x]\n{GOOD}watts = 5\nmemory_gb = 2\nfigure_confidence = {{ watts = 'L' }}")["x"]
    assert chip.figure("watts") == (5.0, "L")
    assert chip.figure("memory_gb") == (2.0, "M")
    assert chip.figure("link_gb_s") is None


@pytest.mark.parametrize("name", ["nvidia", "cuda", "NVIDIA"])
def test_a_vendors_name_gets_its_chips(name):
    with pytest.raises(ChipError, match=r"its chips are a100-40, .*h100-sxm"):
        find_chip(name)


TYPED = tomllib.loads(files("zili.chips").joinpath("typed.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", TYPED)
def test_what_is_said_of_a_name_that_is_none_here_leads_on(name):
    """No chip and no backend goes by it, and what the sentence offers is one."""
    assert identify(name) is None and re.fullmatch("[a-z0-9]+", name)
    assert all(name not in (b.name, b.device_type) for b in registry().backends)
    offered = re.findall(r"(?:did you mean|there is|nearest is|take) ([a-z0-9-]+)", TYPED[name])
    for one in offered:
        assert identify(one) or find_backend(one)


@pytest.mark.parametrize("name", ["4090", "RTX4090", "NVIDIA GeForce RTX 4090", "rtx-4090"])
def test_a_card_from_a_shop_is_there(name):
    card = find_chip(name)
    assert card.name == "rtx-4090" and card.memory_gb == 24
    # 512 tensor cores, 64 multiply-adds each a cycle with sums in fp32, at 2.52 GHz.
    assert card.require("bf16_tflops") == pytest.approx(512 * 128 * 2.52 / 1e3, rel=2e-3)


def test_a_chip_where_a_backend_is_asked_for_gets_what_drives_it():
    with pytest.raises(ChipError, match="rtx-4090 is driven by nvidia"):
        find_backend("4090")
    with pytest.raises(ChipError, match="nvidia, ascend or cambricon"):
        find_backend("gpu")
