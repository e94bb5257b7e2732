import json

import httpx


def ask(server, path="/v1/chat/completions", **body):
    if path.endswith("chat/completions"):
        body = {"messages": [{"role": "user", "content": "one two"}], **body}
    return httpx.post(server + path, content=json.dumps(body), headers={"content-type": "application/json"}, timeout=60)


def test_a_chat_answer_has_openais_form(server):
    found = ask(server, max_tokens=12).json()
    assert found["object"] == "chat.completion"
    assert found["choices"][0]["message"]["role"] == "assistant"
    assert found["usage"]["completion_tokens"] <= 12


def test_text_that_is_no_unicode_is_refused(server):
    answer = ask(server, messages=[{"role": "user", "content": "a\ud800"}])
    assert answer.status_code == 400, answer.text
