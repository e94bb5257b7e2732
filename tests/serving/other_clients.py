"""LangChain and LiteLLM on a server, each as its users call it; `test_clients.py` runs this where they are installed.

python tests/serving/other_clients.py http://127.0.0.1:8000 KEY
"""

import asyncio
import sys

import litellm
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

TALK = [SystemMessage("brief"), HumanMessage("one two")]
MESSAGES = [{"role": "system", "content": "brief"}, {"role": "user", "content": "one two"}]


def langchain(address, key):
    usual = {"base_url": f"{address}/v1", "api_key": key, "model": "tiny", "max_retries": 0}
    chat = ChatOpenAI(
        **usual, max_tokens=12, temperature=0, seed=1, reasoning_effort="low", logprobs=True, top_logprobs=3
    )
    whole = chat.invoke(TALK)
    assert whole.content == "".join(chunk.content for chunk in chat.stream(TALK))
    assert whole.usage_metadata["output_tokens"] <= 12
    assert len(whole.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 3
    later = [*TALK, AIMessage(whole.content), HumanMessage("three")]
    assert [type(one) for one in chat.batch([TALK, later])] == [AIMessage] * 2
    assert asyncio.run(chat.ainvoke(TALK)).content == whole.content
    biased = ChatOpenAI(**usual, max_tokens=12, presence_penalty=1.0, frequency_penalty=0.5, logit_bias={7: 3})
    assert isinstance(biased.invoke(TALK).content, str)
    items = ChatOpenAI(**usual, max_tokens=12, use_responses_api=True, store=False)
    assert items.invoke(TALK).text == whole.content
    assert "".join(chunk.text for chunk in items.stream(TALK)) == whole.content
    assert isinstance(OpenAI(**usual, max_tokens=8).invoke("one two"), str)


def litellm_(address, key):
    usual = {"model": "openai/tiny", "api_base": f"{address}/v1", "api_key": key, "max_tokens": 16, "num_retries": 0}
    whole = litellm.completion(messages=MESSAGES, **usual, presence_penalty=0.0, user="u").choices[0].message.content
    chunks = litellm.completion(messages=MESSAGES, **usual, stream=True, stream_options={"include_usage": True})
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == whole
    text = litellm.text_completion(prompt="one two", **{**usual, "model": "text-completion-openai/tiny"})
    assert isinstance(text.choices[0].text, str)
    usual["max_output_tokens"] = usual.pop("max_tokens")  # LiteLLM asks for 16 at least
    response = litellm.responses(input="one two", instructions="brief", **usual)
    assert response.output[0].content[0].text == whole
    kinds = [event.type for event in litellm.responses(input="one two", stream=True, **usual)]
    assert str(getattr(kinds[-1], "value", kinds[-1])).startswith("response.")
    refused = None
    try:
        litellm.completion(model="openai/tiny", messages=[], api_base=f"{address}/v1", api_key=key)
    except litellm.BadRequestError as error:
        refused = str(error)
    assert refused is not None
    assert "messages" in refused


if __name__ == "__main__":
    langchain(*sys.argv[1:])
    litellm_(*sys.argv[1:])
    print("both work")
