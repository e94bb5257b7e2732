"""Requests made up from the OpenAPI document, valid and not: none breaks the server, each is answered as documented.

The fuller form, against a server that was started by hand (what the fields say together no schema says, hence the
excluded check; a `timeout` of nearly nothing ends in 504, which counts as a server error there):

    schemathesis run http://127.0.0.1:8000/openapi.json --max-examples 500 --generation-deterministic \
        --exclude-checks positive_data_acceptance
"""

from collections import Counter

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings

pytestmark = pytest.mark.slow

schemathesis = pytest.importorskip("schemathesis", reason="it is among the packages for development")

BOUNDED = settings(
    max_examples=40,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def document(server):
    return schemathesis.openapi.from_url(f"{server}/openapi.json")


def made_sensible(body):
    """Set what no schema says: names and roles that fit, a stream where a field needs one, and enough time."""
    body |= {"model": "tiny", "timeout": 60}
    if "messages" in body:
        body["messages"] = [body["messages"][0] | {"role": "user"}]
        body["max_completion_tokens"] = body.get("max_tokens")
    elif "input" in body:
        body |= {"input": "one", "max_tokens": None, "n": None, "diffusion": False}
    elif body.get("suffix"):
        body |= {"slot_tokens": None, "prompt": "one", "stop": None}
    if body.get("diffusion") or body.get("stream_options"):
        body["stream"] = True


@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_made_up_requests_get_documented_answers(document, path, mode):
    excluded = schemathesis.checks.CHECKS.get_by_names(["positive_data_acceptance"])
    seen = Counter()

    @BOUNDED
    @given(case=document[path]["POST"].as_strategy(schemathesis.GenerationMode(mode)))
    def answered(case):
        if mode == "positive":
            made_sensible(case.body)
        response = case.call_and_validate(excluded_checks=excluded, timeout=60)
        seen[response.status_code] += 1
        if response.status_code >= 400:
            error = response.json()["error"]
            assert error["message"]
            assert "\n" not in error["message"]

    answered()
    assert seen.total() >= 20
    assert seen[200] >= 5 if mode == "positive" else seen.keys() == {400}


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/{model_id}", "/health", "/metrics"])
def test_what_is_read_is_as_documented(document, path):
    @BOUNDED
    @given(case=document[path]["GET"].as_strategy())
    def answered(case):
        case.call_and_validate(timeout=60)

    answered()


@pytest.mark.parametrize("name", ["x-odd", "two words", "", "1", "\n"])
def test_a_field_of_any_name_is_refused_by_it(server, name):
    for place in ({name: 1}, {"decoding": {name: 1}}):
        response = httpx.post(f"{server}/v1/completions", json={"prompt": "one", **place})
        assert response.status_code == 400
        assert f"unknown field {name!r}" in response.json()["error"]["message"]


def test_a_failure_of_the_server_itself_has_openais_form(serve_model, monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")

    with serve_model() as (url, app):
        monkeypatch.setattr(app.state.worker, "check_room", fail)
        response = httpx.post(f"{url}/v1/completions", json={"prompt": "one"})
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "a bug" not in response.text
