"""The page in a real browser: what users see and do, at two sizes, light and dark; nothing leaves the origin."""

import json
import os
import random
import re
import shutil
from pathlib import Path

import httpx
import pytest

from illada.serving.options import ServerSettings

pytestmark = pytest.mark.slow

playwright = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")
expect = playwright.expect
expect.set_options(timeout=15_000)

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
SIZES = {"phone": (390, 844), "desk": (1280, 800)}
KEY = "correct horse"
TOKENS = 16
LONG = {"max_tokens": 3900}

CONTRASTS = """
async () => {
  const ending = document.getAnimations().filter((one) => one.effect.getTiming().iterations === 1);
  await Promise.all(ending.map((one) => one.finished));
  const parse = (text) => {
    const numbers = text.match(/[\\d.]+(e-\\d+)?/g).map(Number);
    const [r, g, b, a = 1] = text.startsWith("color(") ? numbers.map((x, i) => i < 3 ? 255 * x : x) : numbers;
    return [r, g, b, a];
  };
  const over = ([r, g, b, a], [x, y, z]) => [r * a + x * (1 - a), g * a + y * (1 - a), b * a + z * (1 - a), 1];
  const light = (color) => color.slice(0, 3)
    .map((x) => x / 255).map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  for (const one of document.querySelectorAll("body *")) {
    const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !one.checkVisibility({ visibilityProperty: true }) || one.closest(".unseen, :disabled")) continue;
    let behind = [255, 255, 255, 1];
    const above = [];
    for (let node = one; node; node = node.parentElement) above.unshift(parse(getComputedStyle(node).backgroundColor));
    for (const layer of above) behind = over(layer, behind);
    const [a, b] = [light(over(parse(getComputedStyle(one).color), behind)), light(behind)];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), `${one.className}: ${one.textContent}`]);
  }
  return found;
}
"""

CONTROLS = """
() => {
  const all = [...document.querySelectorAll("button, input, select, textarea")];
  all.forEach((one, i) => (one.dataset.place = i));
  const modal = document.querySelector(":modal");
  const usable = (one) => one.checkVisibility({ visibilityProperty: true }) && !one.disabled;
  return all.filter((one) => usable(one) && (!modal || modal.contains(one))).map((one) => one.dataset.place);
}
"""

FOCUS = """
() => {
  const { outlineStyle, outlineWidth } = getComputedStyle(document.activeElement);
  return [document.activeElement.dataset.place, outlineStyle === "none" ? 0 : parseFloat(outlineWidth)];
}
"""

REPLAY = """
async ({ frames, visits }) => {
  const { Tokens, noise } = await import("/page/tokens.js");
  const element = document.createElement("p");
  const tokens = new Tokens(element, noise(3));
  for (const frame of frames) tokens.add(frame);
  tokens.finish(true);
  const shown = visits.map((index) => {
    tokens.show(index);
    return [...element.children].map((span) => [span.textContent, span.className.split(" ")[1]]);
  });
  return { shown, text: tokens.text, committed: tokens.committed };
}
"""


@pytest.fixture(scope="module")
def chromium():
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("there is no chromium on this machine")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def patient_model(build_model, tiny_tokenizer):
    """A random model with room for long answers, which no token ends."""
    ids = {f"{kind}_token_id": getattr(tiny_tokenizer, f"{kind}_token_id") for kind in ("mask", "bos", "pad")}
    shape = {"vocab_size": len(tiny_tokenizer), "max_position_embeddings": 4096, "eos_token_id": None}
    return build_model(tie=True, seed=3, **shape, **ids)


@pytest.fixture(scope="module")
def site(serve_model, patient_model):
    with serve_model(model=patient_model, max_new_tokens=TOKENS) as (address, _):
        yield address


@pytest.fixture(scope="module")
def strict_site(serve_model, patient_model, tmp_path_factory):
    """A server that wants a key and answers one request at a time."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY + "\n")
    settings = ServerSettings(api_key_file=str(keys), max_requests=1, max_choices=1)
    with serve_model(settings, model=patient_model, max_new_tokens=TOKENS) as (address, _):
        yield address


@pytest.fixture
def visit(chromium):
    """Open the page as a new visitor would; afterwards nothing may have gone wrong or left the origin."""
    contexts, wrong = [], []

    def go(address, size="desk", theme="light", settings=None, expected=(), context=None, **more):
        if context is None:
            width, height = SIZES[size]
            more = {"viewport": {"width": width, "height": height}, "color_scheme": theme, **more}
            context = chromium.new_context(**more)
            contexts.append(context)
            kept = json.dumps(json.dumps({"pace": "0", **(settings or {})}))
            name = "illada.settings"
            context.add_init_script(f"localStorage.getItem('{name}') ?? localStorage.setItem('{name}', {kept})")
        page = context.new_page()

        def said(message):
            if message.type in ("error", "warning") and not any(part in message.text for part in expected):
                wrong.append(message.text)

        def asked(request):
            if not request.url.startswith((address + "/", "data:")):
                wrong.append(request.url)

        page.on("console", said)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", asked)
        page.goto(address)
        expect(page.locator("#model")).not_to_be_empty()
        return page

    yield go
    for context in contexts:
        context.close()
    assert not wrong


def shoot(page, name):
    if folder := os.environ.get("ILLADA_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def box(page):
    return page.get_by_label("Message", exact=True)


def say(page, text):
    """Send a message; return its exchange and the body of the request."""
    box(page).fill(text)
    with page.expect_request(lambda request: request.method == "POST") as sent:
        box(page).press("Enter")
    return page.locator(".exchange").last, sent.value.post_data_json


def answered(exchange, steps=TOKENS):
    expect(exchange.locator(".step")).to_have_text(f"step {steps} of {steps}")


def completed(exchange):
    """Wait until the last step is shown, whichever it is."""
    expect(exchange.locator(".step")).to_have_text(re.compile(r"^step (\d+) of \1$"))


def whole_answer(site, messages):
    body = {"messages": messages, "max_tokens": TOKENS}
    return httpx.post(f"{site}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]["message"]["content"]


def count(address, line, key=None):
    """A counter of the server."""
    text = httpx.get(f"{address}/metrics", headers={"authorization": f"Bearer {key}"} if key else {}).text
    return next((float(found.split()[-1]) for found in text.splitlines() if found.startswith(line)), 0.0)


def until(true, tries=2000):
    assert any(true() for _ in range(tries))


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_a_conversation_and_its_replay(site, visit, size, theme):
    page = visit(site, size, theme)
    expect(page.locator("#model")).to_have_text("tiny")
    shoot(page, f"welcome-{size}-{theme}")
    first, asked = say(page, "one <b>two</b>")
    answered(first)
    assert asked["messages"] == [{"role": "user", "content": "one <b>two</b>"}]
    expect(first.locator(".said p")).to_have_text("one <b>two</b>")  # text, not markup
    expect(first.locator(".counts")).to_contain_text(f"{TOKENS} tokens · {TOKENS} forwards · 1.00 tokens per forward")

    answer = whole_answer(site, asked["messages"])
    assert page.locator("#spoken").text_content() == f"Answer: {answer}"
    second, asked = say(page, "three")
    assert [turn["content"] for turn in asked["messages"]] == ["one <b>two</b>", answer, "three"]
    answered(second)

    tokens, slider = second.locator(".answer .tokens"), second.get_by_label("Step of the replay")
    final = tokens.text_content()
    slider.press("Home")
    expect(tokens.locator(".m")).to_have_count(8)  # a block, and nothing behind it
    expect(tokens.locator(".c, .p")).to_have_count(0)
    slider.press("ArrowRight")
    expect(tokens.locator(".c")).to_have_count(1)
    expect(tokens.locator(".c, .p, .m")).to_have_count(8)
    shoot(page, f"replay-{size}-{theme}")
    for _ in range(8):
        slider.press("ArrowRight")
    expect(tokens.locator(".c")).to_have_count(9)
    second.get_by_label("Play the steps").click()
    answered(second)
    assert tokens.text_content() == final
    shoot(page, f"conversation-{size}-{theme}")

    for part in ("html", "main", "footer", ".exchange:last-child .tokens"):
        assert page.locator(part).evaluate("(one) => one.scrollWidth <= one.clientWidth"), part
    page.get_by_role("button", name="Settings").click()
    shoot(page, f"settings-{size}-{theme}")
    found = page.evaluate(CONTRASTS)
    assert len(found) > 30
    assert [one for one in found if one[0] < 4.5] == []


@pytest.mark.parametrize("how", ["key", "button"])
def test_a_stop_reaches_the_server(site, visit, how):
    page = visit(site, settings=LONG)
    before = count(site, 'illada_answers_total{how="cancelled"}')
    exchange, _ = say(page, "one")
    expect(exchange.locator(".c").first).to_be_visible()
    page.keyboard.press("Escape") if how == "key" else page.get_by_role("button", name="Stop").click()
    expect(exchange.locator(".counts")).to_contain_text("stopped by you")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(box(page)).to_be_focused()
    until(lambda: count(site, 'illada_answers_total{how="cancelled"}') == before + 1)
    expect(exchange.locator(".replay")).to_be_visible()  # what came can be looked at


@pytest.mark.parametrize("size", SIZES)
def test_gaps_are_filled_in_place(site, visit, size):
    page = visit(site, size)
    say(page, "one")
    box(page).fill("one ___ three ___ five")
    expect(page.locator("#hint")).to_contain_text("2 gaps filled with")
    page.get_by_label("Tokens in each gap").fill("3")
    shoot(page, f"gaps-{size}")
    answered(page.locator(".exchange").first)
    exchange, asked = say(page, "one ___ three ___ five")
    answered(exchange, 6)
    assert (asked["prompt"], asked["slot_tokens"]) == ("one ___ three ___ five", 3)
    expect(exchange.locator(".c")).to_have_count(6)
    given = "".join(exchange.locator(".f").all_text_contents())
    assert given == "one  three  five"
    kinds = exchange.locator(".token").evaluate_all("all => all.map((one) => one.className.split(' ')[1]).join('')")
    assert kinds.strip("f").replace("f", " ").split() == ["ccc", "ccc"]
    exchange.get_by_label("Step of the replay").press("Home")
    expect(exchange.locator(".m")).to_have_count(6)
    shoot(page, f"filled-{size}")
    _, asked = say(page, "two")
    assert [turn["content"] for turn in asked["messages"]][::2] == ["one", "two"]  # gaps are no part of the talk


def test_a_key_is_asked_for_and_never_kept_for_good(strict_site, visit):
    page = visit(strict_site, expected=["401"])
    for key in ("wrong", KEY):
        expect(page.locator("#key-why")).to_contain_text("API key is missing or wrong")
        page.get_by_role("textbox", name="API key").fill(key)
        page.get_by_role("button", name="Use this key").click()
    expect(page.locator("#model")).to_have_text("tiny")
    exchange, _ = say(page, "one")
    answered(exchange)
    assert KEY not in page.evaluate("JSON.stringify(localStorage)")
    assert KEY not in page.content()


def test_a_full_server_says_when_to_try_again(strict_site, visit):
    pages = []
    for _ in range(2):
        page = visit(strict_site, settings=LONG, expected=["401", "429"])
        page.get_by_role("textbox", name="API key").fill(KEY)
        page.get_by_role("button", name="Use this key").click()
        expect(page.locator("#model")).to_have_text("tiny")
        pages.append(page)
    held, refused = pages
    exchange, _ = say(held, "one")
    expect(exchange.locator(".c").first).to_be_visible()
    exchange, _ = say(refused, "two")
    expect(exchange.get_by_role("alert")).to_contain_text("Try again in 1 second")
    held.keyboard.press("Escape")
    until(lambda: count(strict_site, "illada_running", KEY) == 0)
    exchange.get_by_role("button", name="Try again").click()
    expect(exchange.locator(".c").first).to_be_visible()
    expect(exchange.get_by_role("alert")).to_be_hidden()
    refused.keyboard.press("Escape")
    until(lambda: count(strict_site, "illada_running", KEY) == 0)


def test_a_damaged_stream_is_told_in_words(site, visit):
    page = visit(site)
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body="data: {oops\n\n", status=200), times=1)
    exchange, _ = say(page, "one")
    expect(exchange.get_by_role("alert")).to_contain_text("Something between this page and the server damaged")


def test_a_reload_keeps_the_talk(site, visit):
    page = visit(site)
    expect(box(page)).to_be_focused()
    exchange, asked = say(page, "one")
    answered(exchange)
    answer = exchange.locator(".tokens").text_content()
    said = whole_answer(site, asked["messages"])
    page.route("**/v1/chat/completions", lambda route: None, times=1)  # no answer yet
    say(page, "two")
    page.reload()
    expect(page.locator(".exchange")).to_have_count(2)
    expect(page.locator(".exchange .tokens").first).to_have_text(answer)
    expect(page.locator(".exchange .counts").first).to_contain_text(f"{TOKENS} tokens")
    expect(page.locator(".exchange").last.get_by_role("alert")).to_contain_text("loaded anew before this answer")
    assert page.locator(".exchange .token.c").first.get_attribute("class").split()[2].startswith("s")
    with page.expect_request(lambda request: request.method == "POST") as sent:
        page.get_by_role("button", name="Try again").click()
    assert [turn["content"] for turn in sent.value.post_data_json["messages"]] == ["one", said, "two"]
    answered(page.locator(".exchange").last)
    page.get_by_role("button", name="New conversation").first.click()
    page.reload()
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator(".exchange")).to_have_count(0)


def test_suggestions_are_the_models_own(serve_model, patient_model, visit):
    about = {"about": "It learned <b>to sort</b>.", "suggestions": [{"label": "Sort", "text": "Sort 528391."}]}
    with serve_model(model=patient_model, about=about, max_new_tokens=TOKENS) as (address, _):
        page = visit(address)
        expect(page.locator("#kind")).to_contain_text("tiny: a masked diffusion model")
        expect(page.locator("#kind")).to_contain_text("It learned <b>to sort</b>.")
        expect(page.locator("#examples button")).to_have_text(["Sort"])
        page.get_by_role("button", name="Sort").click()
        expect(page.locator(".said p")).to_have_text("Sort 528391.")
        answered(page.locator(".exchange").last)


MARKDOWN = """# Title
A *word*, `code` and [a link](https://example.org), [no link](javascript:alert(1)), [nor](data:text/html,x).

```python
print("<b>")
```
<img src=x onerror=alert(1)><script>alert(1)</script> ![picture](https://example.org/a.png)

- one
"""


def test_markdown_is_formatted_and_harmless(site, visit):
    page = visit(site)
    expect(page.locator("#model")).to_have_text("tiny")
    chunk = {"choices": [{"index": 0, "delta": {"content": MARKDOWN}, "finish_reason": "stop"}], "usage": None}
    step = {"object": "diffusion.step", "index": 0, "block": 0, "step": 0, "forwards": 1, "start": 0}
    step |= {"texts": [MARKDOWN], "states": "c", "confidences": [0.9]}
    usage = {"choices": [], "usage": {"completion_tokens": 1, "forwards": 1}}
    body = f"event: diffusion\ndata: {json.dumps(step)}\n\n"
    body += f"data: {json.dumps(chunk)}\n\ndata: {json.dumps(usage)}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    exchange, _ = say(page, "one")
    formatted = exchange.locator(".formatted")
    expect(formatted.locator("pre code")).to_have_text('print("<b>")\n')
    expect(formatted.locator("h1")).to_have_text("Title")
    links = formatted.locator("a").evaluate_all("all => all.map((one) => one.href)")
    assert links == ["https://example.org/", "https://example.org/a.png"]  # a picture is a link to it
    assert formatted.locator("a").first.get_attribute("rel") == "noopener noreferrer nofollow"
    assert formatted.locator("img, script").count() == 0
    expect(formatted).to_contain_text("<img src=x onerror=alert(1)>")
    shoot(page, "markdown")
    exchange.get_by_role("button", name="Show tokens").click()
    expect(formatted).to_be_hidden()
    expect(exchange.locator(".answer .tokens")).to_contain_text("# Title")
    exchange.get_by_role("button", name="Show formatted").click()
    expect(formatted).to_be_visible()
    page.reload()
    expect(page.locator(".exchange .formatted h1")).to_have_text("Title")


def test_the_picture_says_what_its_axes_and_colours_are(site, visit):
    exchange, _ = say(visit(site), "one")
    answered(exchange)
    expect(exchange.locator(".columns")).to_have_text(f"startpasses of the model →pass {TOKENS}")
    expect(exchange.locator(".rows")).to_have_text("tokens →")
    expect(exchange.locator(".colours")).to_contain_text("undecided")
    expect(exchange.locator(".colours i:visible")).to_have_count(5)  # none for a form, where there is none
    expect(exchange.page.locator("#legend")).not_to_contain_text("by the form", use_inner_text=True)


SCHEMA = """{
  "type": "object",
  "properties": {"sure": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}, "1": {"const": 12345678901234567}},
  "required": ["sure", "kind", "1"],
  "additionalProperties": false
}"""


def ask_for(page, kind, text):
    """Set in the settings what an answer must match; the field is returned."""
    if not page.locator("#settings").is_visible():
        page.get_by_role("button", name="Settings").click()
    page.get_by_label("Answer must match").select_option(kind)
    field = page.locator(f"#settings [name={kind}]")
    field.fill(text)
    return field


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_an_answer_of_a_form_shows_what_the_form_gave(server, visit, size, theme):
    page = visit(server, size, theme, settings={"max_tokens": 80})
    ask_for(page, "json_schema", SCHEMA)
    shoot(page, f"form-settings-{size}-{theme}")
    assert [one for one in page.evaluate(CONTRASTS) if one[0] < 4.5] == []
    page.keyboard.press("Escape")
    exchange, asked = say(page, "one")
    assert asked["guided_json"] == SCHEMA  # as it was written: the order of its keys, all digits
    completed(exchange)
    tokens = exchange.locator(".answer .tokens")
    found = json.loads(tokens.text_content())
    assert [*found] == ["sure", "kind", "1"]
    assert found["1"] == 12345678901234567
    assert '{"sure":' in "".join(tokens.locator(".g").all_text_contents())
    assert tokens.locator(".g").count() > tokens.locator(".c").count() > 0
    style = "(one) => getComputedStyle(one).textDecorationLine"
    assert tokens.locator(".g").first.evaluate(style) == "underline overline"
    expect(page.locator("#legend .of-form")).to_have_text("given by the form")
    expect(page.locator("#legend .of-form")).to_be_visible()
    expect(exchange.locator(".colours i:visible")).to_have_count(6)
    tokens.locator(".g").first.hover()
    expect(tokens.locator(".g").first).to_have_attribute("title", "given by the form, without a pass of the model")
    count = sum(map(bool, tokens.locator(".c, .g").all_text_contents()))  # the end has no text and is not counted
    expect(exchange.locator(".counts")).to_contain_text(f"{count} tokens")
    shoot(page, f"form-answer-{size}-{theme}")
    assert [one for one in page.evaluate(CONTRASTS) if one[0] < 4.5] == []
    page.reload()
    expect(page.locator(".exchange .g").first).to_be_visible()
    expect(page.locator("#legend .of-form")).to_be_visible()
    again, asked = say(page, "two")
    assert asked["guided_json"] == SCHEMA  # the setting is remembered
    completed(again)
    again.get_by_label("Step of the replay").press("Home")
    expect(again.locator(".g, .c")).to_have_count(0)


def test_other_forms_and_gaps_of_a_form(server, visit):
    page = visit(server, settings={"max_tokens": 80})
    ask_for(page, "regex", "(?:abcdefgh){4}[0-9]{2}")
    exchange, asked = say(page, "one")
    assert asked["guided_regex"] == "(?:abcdefgh){4}[0-9]{2}"
    completed(exchange)  # whole blocks without a pass are shown as well
    assert re.fullmatch("(?:abcdefgh){4}[0-9]{2}", exchange.locator(".answer .tokens").text_content())
    ask_for(page, "choices", "certainly\n\n not at all \n")
    exchange, asked = say(page, "one")
    assert asked["guided_choice"] == ["certainly", " not at all "]
    completed(exchange)
    assert exchange.locator(".answer .tokens").text_content() in asked["guided_choice"]
    ask_for(page, "regex", "[0-9]{3}-")
    box(page).fill("one ___ two")
    page.get_by_label("Tokens in each gap").fill("4")
    exchange, asked = say(page, "one ___ two")
    assert (asked["guided_regex"], asked["slot_tokens"]) == ("[0-9]{3}-", 4)
    completed(exchange)
    assert re.fullmatch("one [0-9]{3}- two", exchange.locator(".answer .tokens").text_content())
    assert exchange.locator(".g").all_text_contents() == ["-"]
    shoot(page, "form-gaps")
    page.get_by_label("Answer must match").select_option("none")
    _, asked = say(page, "one")
    assert not asked.keys() & {"guided_json", "guided_regex", "guided_choice", "response_format"}


@pytest.mark.parametrize("size", SIZES)
def test_a_form_that_cannot_be_is_not_sent(server, visit, size):
    page = visit(server, size, expected=["400"])
    sent = []
    page.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
    wrong = page.locator("#wrong")
    for kind, text, line in [
        ("json_schema", "", "Write the schema as JSON"),
        ("json_schema", '{"type": "object",}', "This is no JSON: "),
        ("json_schema", "[1]", "A schema is an object"),
        ("regex", "", "Write the expression"),
        ("choices", "\n \n", "Write one choice a line"),
    ]:
        field = ask_for(page, kind, text)
        expect(wrong).to_contain_text(line)
        assert field.evaluate("(one) => one.getAttribute('aria-describedby')") == "wrong"
        page.keyboard.press("Escape")
        box(page).fill("one")
        box(page).press("Enter")
        expect(field).to_be_focused()  # the settings are open again, where the mistake is
        expect(wrong).to_be_visible()
        shoot(page, f"form-wrong-{kind}-{len(text)}-{size}")
    expect(page.locator(".exchange")).to_have_count(0)
    assert sent == []
    ask_for(page, "regex", "(?=a)b")  # only the server can know
    expect(wrong).to_be_hidden()
    page.keyboard.press("Escape")
    exchange, _ = say(page, "one")
    expect(exchange.get_by_role("alert")).to_contain_text("lookahead")
    shoot(page, f"form-refused-{size}")
    ask_for(page, "json_schema", "{")
    page.keyboard.press("Escape")
    exchange.get_by_role("button", name="Try again").click()
    expect(page.locator("#settings [name=json_schema]")).to_be_focused()
    assert len(sent) == 1


def test_the_servers_own_form_is_the_default(serve_model, visit):
    schema = json.loads(SCHEMA)
    with serve_model(max_new_tokens=80, json_schema=schema) as (address, _):
        page = visit(address)
        expect(page.locator("#model")).to_have_text("tiny")
        exchange, asked = say(page, "one")
        expect(exchange.locator(".g").first).to_be_visible()
        assert not asked.keys() & {"guided_json", "response_format"}
        page.get_by_role("button", name="Settings").click()
        assert json.loads(page.locator("[name=json_schema]").input_value()).keys() == schema.keys()
        completed(exchange)
        page.get_by_label("Answer must match").select_option("none")
        exchange, asked = say(page, "one")
        assert asked["response_format"] == {"type": "text"}
        completed(exchange)
        expect(exchange.locator(".g")).to_have_count(0)


def test_a_lost_server_can_come_back(site, visit):
    page = visit(site, expected=["ERR_INTERNET_DISCONNECTED"])
    expect(page.locator("#model")).to_have_text("tiny")

    def cut(route):
        body = route.fetch().body()
        route.fulfill(body=body[: body.index(b'"forwards":7')], content_type="text/event-stream")

    page.route("**/v1/chat/completions", cut, times=1)
    exchange, _ = say(page, "one")
    expect(exchange.get_by_role("alert")).to_contain_text("connection to the server was lost")
    expect(exchange.locator(".c")).to_have_count(6)  # what came before is kept
    page.context.set_offline(True)
    exchange, _ = say(page, "two")
    expect(exchange.get_by_role("alert")).to_contain_text("cannot be reached")
    shoot(page, "lost")
    page.context.set_offline(False)
    exchange.get_by_role("button", name="Try again").click()
    answered(exchange)
    expect(exchange.get_by_role("alert")).to_be_hidden()


def test_a_full_context_offers_a_new_conversation(site, visit):
    page = visit(site, expected=["400"])
    answered(say(page, "one")[0])
    exchange, _ = say(page, "abcdefgh" * 600)
    expect(exchange.get_by_role("alert")).to_contain_text("but the context is 4096")
    exchange.get_by_role("button", name="New conversation").click()
    expect(page.locator(".exchange")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()
    exchange, asked = say(page, "two")
    assert len(asked["messages"]) == 1
    answered(exchange)
    exchange.get_by_role("button", name="Edit").click()
    expect(box(page)).to_have_value("two")
    expect(page.locator(".exchange")).to_have_count(0)


def test_settings_are_sent_and_remembered(site, visit):
    page = visit(site)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System message").fill("Be brief.")
    page.get_by_label("Most tokens").fill("8")
    page.get_by_label("Keep at each pass").select_option("steps_per_block")
    page.get_by_label("Passes a block").fill("2")
    expect(page.get_by_label("Top p")).to_be_disabled()
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Top p").fill("0.9")
    page.get_by_label("Seed").fill("7")
    for _ in range(2):
        exchange, asked = say(page, "one")
        answered(exchange, 2)
        assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
        assert asked["decoding"] == {"steps_per_block": 2, "cache": "none", "speculate": 0}
        assert [asked[name] for name in ("max_tokens", "temperature", "top_p", "seed")] == [8, 0.5, 0.9, 7]
        page.reload()
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Back to the server's settings").click()
    _, asked = say(page, "one")
    assert not {"decoding", "max_tokens", "temperature", "top_p", "seed"} & asked.keys()
    page.get_by_label("Most tokens").fill("0")
    box(page).fill("two")
    box(page).press("Enter")
    expect(page.locator(".exchange")).to_have_count(3)  # a value that cannot be is not sent
    page.get_by_role("button", name="Dark colours").click()
    page.reload()
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "dark"


@pytest.mark.parametrize("mode", ["exact", "fast", "threshold"])
def test_the_server_knows_every_way_to_decode(site, visit, mode):
    exchange, asked = say(visit(site, settings={"rule": mode, "block_length": 4}), "one")
    expect(exchange.locator(".counts")).to_contain_text(f"{TOKENS} tokens")
    wanted = {
        "exact": {"block_length": 4, "steps_per_block": 4, "cache": "none", "speculate": 0},
        "fast": "fast",
        "threshold": {"block_length": 4, "threshold": 0.9, "cache": "none", "speculate": 0},
    }
    assert asked["decoding"] == wanted[mode]


def test_a_model_without_a_chat_template_goes_on_with_the_text(site, visit, chromium):
    page = visit(site)

    def plain(route):
        found = route.fetch().json()
        found["data"][0]["chat"] = False
        route.fulfill(json=found)

    page.route("**/v1/models", plain)
    page.reload()
    expect(page.locator("#model")).to_have_text("tiny")
    exchange, asked = say(page, "one two")
    assert asked["prompt"] == "one two"
    answered(exchange)


@pytest.mark.parametrize("size", SIZES)
def test_every_control_is_reached_by_tab(site, visit, size):
    page = visit(site, size)
    answered(say(page, "one")[0])
    reached = set()

    def walk():
        wanted = page.evaluate(CONTROLS)
        reached.clear()
        for _ in range(len(wanted) + 6):
            page.keyboard.press("Tab")
            place, ring = page.evaluate(FOCUS)
            assert ring >= 1 or place is None  # one sees where one is
            reached.add(place)
        assert set(wanted) <= reached
        return len(wanted)

    assert walk() >= 9
    page.get_by_role("button", name="Settings").press("Enter")
    assert walk() >= 12
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    expect(page.get_by_role("button", name="Settings")).to_have_attribute("aria-expanded", "false")


def test_nothing_moves_for_those_who_want_calm(site, visit):
    page = visit(site, settings=LONG, reduced_motion="reduce")
    expect(page.locator("#title")).to_have_text("Text, out of noise.")
    exchange, _ = say(page, "one")
    expect(exchange.locator(".c").first).to_be_visible()
    assert page.evaluate("document.getAnimations().length") == 0
    page.keyboard.press("Escape")


def test_any_step_can_be_shown_after_any_other(site, visit):
    rng = random.Random(5)
    frames, states = [], []  # what the server would send, and the whole answer after each
    whole = []
    for size in (5, 2, 6, 4):
        start = len(whole)
        undecided = list(range(size))
        while undecided:
            undecided.remove(rng.choice(undecided))
            kinds = "".join(rng.choice("pm") if i in undecided else "c" for i in range(size))
            texts = [f"{start + i}{kind}{len(undecided)}" if kind != "m" else "" for i, kind in enumerate(kinds)]
            frames.append({"start": start, "texts": texts, "states": kinds, "confidences": [0.5] * size})
            whole = [*whole[:start], *map(list, zip(texts, kinds, strict=True))]
            states.append(whole)
    visits = [rng.randint(1, len(frames)) for _ in range(60)]
    found = visit(site).evaluate(REPLAY, {"frames": frames, "visits": visits})
    assert found["shown"] == [states[index - 1] for index in visits]
    assert found["text"] == "".join(text for text, _ in states[-1])
    assert found["committed"] == len(states[-1])
