# SPDX-License-Identifier: Apache-2.0
import pytest

from embedrl_verl.errors import ConfigError
from embedrl_verl.serving import PoolSettings, ServerPool, server_url


@pytest.mark.parametrize(
    "url", ["http://a:80/v1", "http://a:80/v1/", "http://a:80/", "http://a:80", "a:80", " a:80/v1 ", "http://a:80//"]
)
def test_every_way_to_write_an_address_gives_the_same_one(url):
    assert server_url(url) == "http://a:80"


def test_prefixes_ipv6_and_https_are_kept():
    assert server_url("https://host/openai/v1/") == "https://host/openai"
    assert server_url("[::1]:8000") == "http://[::1]:8000"


@pytest.mark.parametrize(
    "url",
    ["", "http://", "ftp://a", "http://a:port", "http://a:99999", "http://a:0", "http://a b", None, "http://a?x=1"],
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ConfigError, match="URL must"):
        server_url(url)


def test_credentials_in_an_address_are_refused_and_not_repeated():
    with pytest.raises(ConfigError) as caught:
        server_url("http://user:secret@host:1")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("urls", [[], ["a:1", "http://a:1/v1"]])
def test_a_pool_needs_different_servers(urls):
    with pytest.raises(ConfigError, match="one or more different"):
        ServerPool(urls)


@pytest.mark.parametrize(
    ("key", "value"),
    [("limit", 0), ("timeout_s", 0), ("timeout_s", float("nan")), ("retries", -1), ("backoff_s", -1.0)],
)
def test_settings_that_cannot_work_are_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=key):
        PoolSettings(**{key: value})
