"""The page in a real browser: both themes, a phone, the keyboard, no script, no network."""

import pytest
from browser import Browser, binary

pytestmark = pytest.mark.services

NASTY = "<script>alert(1)</script>"
WRONG = ("Runtime.exceptionThrown", "Page.javascriptDialogOpening", "Runtime.consoleAPICalled", "Log.entryAdded")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if binary() is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture
def url(make_run, page, tmp_path):
    names = [f"a class with a long name {number}" for number in range(12)]
    for number, acc in enumerate((0.25, 0.75, 0.5)):
        long = {"optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1 * number}, "seed": number}
        more = {"status": "failed", "reason": "x" * 400} if number == 1 else {}
        make_run(
            f"a_name_that_does_not_end_{number}_" + "x" * 60,
            long,
            classes=names,
            mistakes=6,
            overrides=(f"name={NASTY}", f"optimizer.lr={0.1 * number}", "z=" + "y" * 200),
            best={"val_acc": acc},
            started=1.7e9 - number,
            **more,
        )
    page()
    return (tmp_path / "report.html").as_uri()


def test_nothing_is_loaded_nothing_complains_and_nothing_overflows(browser, url):
    grounds = set()
    for scheme in ("light", "dark"):
        for width in (1280, 360):
            seen = len(browser.events)
            browser.open(url, width=width, scheme=scheme)
            assert browser.value("document.querySelectorAll('details').forEach(d => d.open = true)") is None
            assert browser.value("document.documentElement.scrollWidth") <= width
            assert browser.value("innerWidth") == width
            grounds.add((scheme, browser.value("getComputedStyle(document.body).backgroundColor")))
            # What is wider than a phone scrolls in a box of its own.
            boxes = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
            assert browser.value(boxes) > (5 if width == 360 else 0)
            box = "document.querySelector('.scroll')"  # where it does, the runs' names stay
            browser.value(f"{box}.scrollLeft = 200")
            left = f"[...{box}.querySelectorAll('tr > :first-child')].map(e => e.getBoundingClientRect().left)"
            assert browser.value(f"Math.min(...{left}) >= {box}.getBoundingClientRect().left - 1")
            texts = "[...document.querySelectorAll('figure svg text')].map(e => e.getBoundingClientRect().height)"
            assert browser.value(f"Math.min(...{texts})") >= 9
            broken = "[...document.images].filter(e => !e.complete || !e.naturalWidth).length"
            assert browser.value(broken) == 0 and browser.value("document.images.length") == 18
            told = browser.events[seen:]
            assert [event for event in told if event[0] in WRONG] == []
            asked = {what["request"]["url"] for how, what in told if how == "Network.requestWillBeSent"}
            assert {address for address in asked if not address.startswith("data:")} == {url}
    assert grounds == {("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 23, 27)")}
    assert browser.value("document.scripts.length") == 1
    assert NASTY in browser.value("document.querySelector('pre').textContent")


FOCUSED = """(() => {
    const e = document.activeElement, r = e.getBoundingClientRect();
    const section = e.closest('main > section')?.id ?? '';
    const seen = r.width > 0 && r.left >= 0 && r.right <= innerWidth + 1;
    return [e.tagName, e.getAttribute('href') ?? '', section, seen, getComputedStyle(e).outlineStyle != 'none'];
})()"""


def test_the_keyboard_reaches_every_section(browser, url):
    browser.open(url)
    browser.press("Tab")
    assert browser.value(FOCUSED)[:2] == ["A", "#main"]
    stops = []
    while len(stops) < 200 and (not stops or stops[-1][0] != "BODY"):
        stops.append(browser.value(FOCUSED))
        browser.press("Tab")
    stops = [stop for stop in stops if stop[0] != "BODY"]
    assert all(visible and outlined for *_, visible, outlined in stops), stops
    assert [href for _, href, section, *_ in stops if not section] == [
        *("#main", "#comparison", "#unfinished", "#curves", "#throughput", "#runs"),
    ]
    order = list(dict.fromkeys(section for _, _, section, *_ in stops if section))
    assert order == ["comparison", "unfinished", "curves", "throughput", "runs"]
    for tag in ("SUMMARY", "BUTTON", "PRE"):
        there = f"[...document.querySelectorAll('{tag}')].filter(e => e.checkVisibility()).length"
        assert browser.value(there) == len([stop for stop in stops if stop[0] == tag]) > 0

    browser.open(url)
    browser.press("Tab")
    browser.press("Enter")
    assert browser.value("document.activeElement.id") == "main"
    browser.press("Tab")
    assert browser.value(FOCUSED)[2] == "comparison"


def test_tables_are_sorted_and_runs_opened_by_the_keyboard(browser, url):
    browser.open(url)
    table = "[...document.querySelectorAll('table[data-sort]')].find(t => t.textContent.includes('status'))"
    button = f"[...{table}.querySelectorAll('thead button')].find(b => b.textContent == 'best_val_acc')"
    place = f"[...{table}.tHead.rows[0].cells].indexOf({button}.parentNode)"
    column = f"[...{table}.tBodies[0].rows].map(row => row.cells[{place}].textContent)"
    assert browser.value(column) == ["0.2500", "0.7500", "0.5000"]
    for expected, way in (
        (["0.2500", "0.5000", "0.7500"], "ascending"),
        (["0.7500", "0.5000", "0.2500"], "descending"),
    ):
        browser.value(f"{button}.focus()")
        browser.press("Enter")
        assert browser.value(column) == expected
        assert browser.value(f"{button}.parentNode.getAttribute('aria-sort')") == way
    details = "document.querySelector('#run-3 details')"
    browser.value(f"{details}.open = false; {details}.querySelector('summary').focus()")
    browser.press("Enter")
    assert browser.value(f"{details}.open") is True
    browser.value(f"{details}.open = false; location.hash = '#run-3'")
    assert browser.value(f"new Promise(done => setTimeout(() => done({details}.open), 50))") is True


def test_without_scripts_it_says_the_same(browser, url):
    words = "document.querySelector('main').textContent.replace(/\\s+/g, ' ')"
    browser.open(url)
    expected = browser.value(words)
    browser.open(url, scripts=False)
    assert browser.value("document.querySelectorAll('thead button').length") == 0
    assert browser.value(words) == expected
    assert "0.7500" in expected
