"""The numbers of the README are those of committed results, its links lead somewhere, and its picture is drawn from the same."""

import json
import re
import runpy

import pytest


@pytest.fixture(scope="module")
def page(root):
    return runpy.run_path(str(root / "benchmarks" / "front_page.py"))


@pytest.fixture(scope="module")
def root(request):
    return request.config.rootpath


@pytest.fixture(scope="module")
def readme(root):
    return (root / "README.md").read_text(encoding="utf-8")


def test_perplexities_and_sizes(page, readme):
    rows = {line.name: line for line in page["lines"]()}
    for name, line in rows.items():
        found = re.search(rf"^\| `?{re.escape(name.replace(', ', '`, ', 1))} \| [\d, ]+ \| ([\d.]+)", readme, re.MULTILINE)
        if name.startswith("Counter"):
            assert found[1] == f"{line.ratio:.3f}"
    fp32, one, best = rows["fp32 with Adam"], rows["Counter(8), 1 plane"], rows["Counter(8), 4 planes"]
    assert "28 times smaller" in readme
    assert round(fp32.served / one.served) == 28
    assert "an eleventh" in readme
    assert round(fp32.training / best.training) == 11
    assert f"loses {100 * (one.ratio - 1):.1f} % of perplexity" in readme


def test_times(root, readme):
    rows = json.loads((root / "benchmarks/results/2026-11-28-speed-h100.json").read_text())["rows"]
    wanted = ("dualbin.torch.XOR.step, Counter(8)", "sparse gradient, SparseAdam", "sparse gradient, coalesce, SGD step")
    wanted += ("embedding_dense_backward (no update)",)
    times = {
        (row["workload"].replace(",", ""), row["operation"]): row["median_us"]
        for row in rows
        if row["frontend"] == "torch" and row["direction"] == "backward + update" and row["dtype"] == "fp32"
    }
    section = readme.split("## Time")[1].split("\n| ratio")[0]
    table = re.findall(r"^\| ([\d,]+ x \d+), ([\d,]+) ids \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", section, re.MULTILINE)
    assert len(table) == 3
    faster = []
    for size, ids, *numbers in table:
        workload = f"{size} N = {ids} uniform".replace(",", "")
        assert [round(times[workload, name]) for name in wanted] == [int(number) for number in numbers]
        faster.append([times[workload, name] / times[workload, wanted[0]] for name in wanted])
    adam, sgd = ([each[place] for each in faster] for place in (1, 2))
    assert f"`XOR` is {min(adam):.0f} to {max(adam):.0f} times as fast as SparseAdam, and {min(sgd):.1f} to {max(sgd):.1f} times" in readme


def test_times_of_whole_steps(root, readme):
    rows = json.loads((root / "benchmarks/results/2026-11-28-speed-h200.json").read_text())["rows"]
    wanted = ("dualbin.torch, Counter(8)", "nn.Embedding(sparse=True), SparseAdam", "nn.Embedding, AdamW")
    times = {
        (row["workload"].replace(",", ""), row["operation"]): row["median_us"]
        for row in rows
        if row["direction"] == "forward + backward + update" and row["dtype"] == "fp32"
    }
    table = re.findall(r"^\| ([\d,]+ x \d+), ([\d,]+) ids \| (\d+) \| (\d+) \| (\d+) \|$", readme, re.MULTILINE)
    assert len(table) == 3
    for size, ids, *numbers in table:
        workload = f"{size} N = {ids} uniform".replace(",", "")
        assert [round(times[workload, name]) for name in wanted] == [int(number) for number in numbers]


def test_the_picture(page, root, tmp_path):
    pytest.importorskip("matplotlib")
    page["draw"](tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert (root / "docs/images/front.png").read_bytes().startswith(b"\x89PNG")


def test_links_of_all_pages_lead_to_files(root):
    for page in (root / "README.md", *(root / "docs").glob("*.md"), *root.glob("[A-Z]*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http", "mailto:")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_links_for_an_index_page_are_absolute(root):
    absolute = runpy.run_path(str(root / "scripts" / "absolute_links.py"))["absolute"]
    text = absolute((root / "README.md").read_text(encoding="utf-8"), "https://host/owner/name/", "v1")
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    assert targets
    assert all(target.startswith("https://") for target in targets)
    assert (
        "![GB in training and served, and perplexity, of fp32 with Adam and of packed tables](https://host/owner/name/raw/v1/docs/" in text
    )
    assert "[docs/design.md](https://host/owner/name/blob/v1/docs/design.md)" in text
    assert 'state["x"](1)' in absolute('```\nstate["x"](1)\n```', "https://host/o/n", "v1")


def test_pages_of_the_site_are_there(root):
    pages = re.findall(r"^ +- (?:\w+: )?([\w/]+\.md)$", (root / "mkdocs.yml").read_text(), re.MULTILINE)
    made = {"index.md", "changelog.md", "contributing.md", "security.md"}
    assert len(pages) > 15
    assert [page for page in pages if page not in made and not page.startswith("api/") and not (root / "docs" / page).exists()] == []
