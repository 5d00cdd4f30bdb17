"""Requests to a registry: authentication, redirects, retries, and one sentence for every way in which they fail.

oras has the session, and exchanges credentials for a token. Added to that are limits: on time, on the size of answers
that are read into memory, on redirects, and on where credentials and plain HTTP go.
"""

from __future__ import annotations

import base64
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any, TypeVar
from urllib.parse import urljoin, urlsplit

from amoeba_deploy.delivery.artifact import MAX_DOCUMENT
from amoeba_deploy.delivery.credentials import credentials_for
from amoeba_deploy.delivery.reference import Reference, is_loopback
from amoeba_deploy.errors import BadInput, ToolchainMissing

if TYPE_CHECKING:
    import requests

TRIES = 5
MAX_REDIRECTS = 5
CONNECT_SECONDS, READ_SECONDS = 15.0, 60.0
"""Longest waits: for a connection, and for the next bytes."""
FIRST_PAUSE, MAX_PAUSE = 0.5, 60.0
"""Seconds before the second try, doubled before each further one; the most that a registry can ask for."""
BLOCK = 1 << 20
"""Bytes that are sent and received at a time."""

T = TypeVar("T")
Body = bytes | Callable[[], IO[bytes]]
"""What is sent: bytes, or what opens a file, which happens anew for every try."""


class Dropped(Exception):
    """A request that may succeed when it is tried again; ``sentence`` says what happened, ``pause`` when to try."""

    def __init__(self, sentence: str, pause: float | None = None) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.pause = pause


def require_oras() -> None:
    """Raise ToolchainMissing where the library that talks to registries is not installed."""
    from importlib.util import find_spec

    if find_spec("oras") is None:
        raise ToolchainMissing("registries need oras, which is not installed; run pip install 'amoeba-deploy[deliver]'")


class Connection:
    """A registry as one repository sees it; several threads may use it.

    Args:
        reference: whose host and repository are meant.
        plain_http: speak HTTP without TLS; done by itself where the host is this machine.
        sleep: waits between tries.
    """

    def __init__(
        self, reference: Reference, *, plain_http: bool = False, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        require_oras()
        import oras.provider

        # What oras logs is raised here as a sentence.
        logging.getLogger("oras.logger").setLevel(logging.CRITICAL)
        self.reference = reference
        self.sleep = sleep
        self._plain_anywhere = plain_http
        self._plain = plain_http or is_loopback(reference.host)
        self._scheme = "http" if self._plain else "https"
        self._oras = oras.provider.Registry(hostname=reference.address, insecure=self._plain)
        self.session: requests.Session = self._oras.session
        self.session.max_redirects = MAX_REDIRECTS
        # Else requests puts what a .netrc says in place of the header that the registry asked for.
        self.session.auth = lambda request: request
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, _adapter())
        self._lock = threading.Lock()
        self._authorization: str | None = None
        self._reached = False
        self._open: set[requests.Response] = set()

    @contextmanager
    def streaming(self, response: requests.Response) -> Iterator[requests.Response]:
        """An answer whose body is read piece by piece; closed at the end, or by ``abort``."""
        self._open.add(response)
        try:
            with response:
                yield response
        finally:
            self._open.discard(response)

    def abort(self) -> None:
        """End all answers that are being read, so that no thread goes on waiting for one."""
        for response in list(self._open):
            with suppress(Exception):  # one that ended meanwhile
                response.raw.shutdown()

    def url(self, tail: str) -> str:
        """The address of something in the repository, such as ``blobs/sha256:...``."""
        return f"{self._scheme}://{self.reference.address}/v2/{self.reference.name}/{tail}"

    def send(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: Body | None = None,
        stream: bool = False,
    ) -> requests.Response:
        """An answer, whatever its status, after redirects and authentication; dropped requests are tried again.

        Raises:
            BadInput: the registry cannot be reached, refuses whom it asks for, or redirects without end.
        """
        return self.trying(lambda: self.send_once(method, url, headers=headers, body=body, stream=stream))

    def trying(self, attempt: Callable[[], T]) -> T:
        """What ``attempt`` returns, tried again with growing pauses when it raises Dropped.

        Raises:
            BadInput: the last try was dropped too.
        """
        for number in range(1, TRIES):
            try:
                return attempt()
            except Dropped as dropped:
                self.pause(number, dropped)
        try:
            return attempt()
        except Dropped as dropped:
            raise self.given_up(dropped) from None

    def pause(self, number: int, dropped: Dropped) -> None:
        """Wait before the try after the ``number``-th."""
        wanted = FIRST_PAUSE * 2 ** (number - 1) if dropped.pause is None else dropped.pause
        self.sleep(min(wanted, MAX_PAUSE))

    def given_up(self, dropped: Dropped) -> BadInput:
        """What a user reads after the last try."""
        return BadInput(f"{self.reference}: {dropped.sentence}, {TRIES} times; try again later")

    def send_once(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: Body | None = None,
        stream: bool = False,
    ) -> requests.Response:
        """As ``send``, without another try.

        Raises:
            Dropped: the connection broke, or the registry is busy or failed.
        """
        sent = self._authorization
        response = self._follow(method, url, headers or {}, body, stream, sent)
        if response.status_code == 401 and self._is_own(response.url):
            answer = self._answer(response, sent)
            response.close()
            if answer is not None:
                response = self._follow(method, url, headers or {}, body, stream, answer)
            if response.status_code == 401:
                response.close()
                raise self._refused()
        if response.status_code == 429 or response.status_code >= 500:
            said = f"{urlsplit(response.url).netloc} answers {_status(response)}"
            response.close()
            raise Dropped(said, _retry_after(response))
        return response

    def check(self, response: requests.Response, *expected: int) -> requests.Response:
        """The answer where its status is one of those expected; else BadInput says what the registry refuses."""
        if response.status_code in expected:
            return response
        status, said = _status(response), _message(response)
        response.close()
        host = self.reference.host
        if response.status_code == 403:
            raise BadInput(f"{self.reference}: {host} denies access{said}; run 'docker login {host}' as who may")
        if response.status_code == 404:
            raise BadInput(f"{self.reference}: is not in the registry{said}; check its name and its tag")
        raise BadInput(f"{self.reference}: {host} answers {status}{said}; check the reference and the registry")

    def _refused(self) -> BadInput:
        host = self.reference.host
        if credentials_for(host) is not None:
            return BadInput(f"{self.reference}: {host} does not accept the login; run 'docker login {host}' again")
        return BadInput(f"{self.reference}: {host} wants a login; run 'docker login {host}'")

    def _is_own(self, url: str) -> bool:
        """Whether an address is the registry's own, which alone is given credentials."""
        parts = urlsplit(url)
        return (parts.scheme, parts.netloc) == (self._scheme, self.reference.address)

    def _follow(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: Body | None,
        stream: bool,
        authorization: str | None,
    ) -> requests.Response:
        """One answer after its redirects. Only what asks is redirected; what sends is told where to send before."""
        for _ in range(MAX_REDIRECTS + 1):
            given = {"Authorization": authorization} if authorization and self._is_own(url) else {}
            response = self._transport(method, url, {**headers, **given}, body, stream)
            if response.status_code not in (301, 302, 303, 307, 308) or method not in ("GET", "HEAD"):
                return response
            target = urljoin(url, response.headers.get("Location", ""))
            response.close()
            self.check_address(target)
            url = target
        raise BadInput(f"{self.reference}: the registry redirects more than {MAX_REDIRECTS} times; check its address")

    def check_address(self, url: str) -> None:
        """Raise BadInput where the registry sends elsewhere without TLS, or to what is no address."""
        parts = urlsplit(url)
        # A registry that is this machine may send to this machine.
        plain = parts.scheme == "http" and (self._plain_anywhere or (self._plain and is_loopback(parts.netloc)))
        if not parts.hostname or (parts.scheme != "https" and not plain):
            raise BadInput(
                f"{self.reference}: the registry sends on to {url[:100]!r}, which is not https; ask who runs it, or "
                f"add --plain-http"
            )

    def _transport(
        self, method: str, url: str, headers: Mapping[str, str], body: Body | None, stream: bool
    ) -> requests.Response:
        """One request and its answer.

        Raises:
            Dropped: the connection broke.
            BadInput: there is no connection to be had.
        """
        import requests

        own = {"Accept-Encoding": "identity", **headers}
        data = body() if callable(body) else body
        try:
            # What is on this machine is not behind a proxy.
            direct = {"no_proxy": urlsplit(url).hostname or ""} if is_loopback(urlsplit(url).netloc) else None
            response = self.session.request(
                method, url, headers=own, data=data, stream=stream, allow_redirects=False, proxies=direct
            )
        except (requests.RequestException, TooLong) as error:
            raise self.failure(error, url) from None
        finally:
            if data is not None and not isinstance(data, bytes):
                data.close()
        self._reached = True
        return response

    def failure(self, error: Exception, url: str) -> Exception:
        """What a broken request is to be raised as: Dropped where another try may help, else BadInput."""
        import requests

        host, said = urlsplit(url).netloc, _chain(error)
        if isinstance(error, TooLong):
            limit = f"{MAX_DOCUMENT >> 20} MB"
            return BadInput(
                f"{self.reference}: {host} sends more than {limit} where a manifest belongs; it is not to be trusted"
            )
        if isinstance(error, requests.exceptions.SSLError) and not self._reached:
            return BadInput(
                f"{self.reference}: {host} has no certificate that is trusted here, or speaks no TLS ({said[-1]}); set "
                f"REQUESTS_CA_BUNDLE, or add --plain-http"
            )
        if isinstance(error, requests.exceptions.ProxyError):
            return BadInput(f"{self.reference}: the proxy does not connect to {host} ({said[-1]}); see HTTPS_PROXY")
        if any("NameResolution" in text or "getaddrinfo" in text for text in said):
            return BadInput(f"{self.reference}: the host {host} is not known; check its name and the network")
        if isinstance(error, requests.exceptions.ConnectTimeout) and not self._reached:
            return BadInput(f"{self.reference}: {host} does not answer; check its address and the network")
        if any("Connection refused" in text for text in said) and not self._reached:
            return BadInput(f"{self.reference}: {host} refuses connections; check its port, and that a registry runs")
        if isinstance(error, (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema)):
            return BadInput(f"{self.reference}: is redirected to what is no address; ask who runs the registry")
        return Dropped(f"the connection to {host} breaks ({said[-1]})")

    def _answer(self, response: requests.Response, sent: str | None) -> str | None:
        """What a registry asks for in its 401, as a header's value; None where there is nothing new to send."""
        with self._lock:
            if self._authorization != sent:
                return self._authorization  # another thread has done so meanwhile
            challenge = response.headers.get("Www-Authenticate", "")
            login = credentials_for(self.reference.host)
            if challenge.lower().startswith("basic"):
                answer = None if login is None else _basic(*login)
            else:
                answer = self._token(response, login)
            if answer is None or answer == sent:
                return None
            self._authorization = answer
            return answer

    def _token(self, response: requests.Response, login: tuple[str, str] | None) -> str | None:
        """A bearer token from the server that the registry names, or None where it gives none."""
        import requests
        from oras.auth import get_auth_backend
        from oras.auth.utils import parse_auth_header

        realm = parse_auth_header(response.headers.get("Www-Authenticate", "")).realm or ""
        if not realm:
            return None
        self.check_address(realm)
        exchange = get_auth_backend("token", self.session, self._plain)
        if login is not None:
            exchange.set_basic_auth(*login)
        try:
            headers, _ = exchange.authenticate_request(response, {})
        except (requests.exceptions.JSONDecodeError, AttributeError, TypeError):
            return None  # an answer without a token
        except (requests.RequestException, TooLong) as error:
            raise self.failure(error, realm) from None
        found = headers.get("Authorization")
        return found if isinstance(found, str) else None


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def _adapter() -> Any:
    """requests' transport with limits of time and size, and large blocks."""
    from requests.adapters import HTTPAdapter

    class Limited(HTTPAdapter):
        """Waits no longer than the limits, and reads no answer into memory that is larger than a manifest."""

        def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
            super().init_poolmanager(*arguments, **options, blocksize=BLOCK)

        def send(
            self,
            request: requests.PreparedRequest,
            stream: bool = False,
            timeout: Any = None,
            verify: Any = True,
            cert: Any = None,
            proxies: Any = None,
        ) -> requests.Response:
            limits = timeout or (CONNECT_SECONDS, READ_SECONDS)
            response = super().send(request, True, limits, verify, cert, proxies)
            return response if stream else _with_body(response)

    return Limited(pool_maxsize=16)


class TooLong(Exception):
    """An answer that is larger than what belongs there."""


def _with_body(response: requests.Response) -> requests.Response:
    """The answer with its whole body read; raises TooLong where that is larger than any manifest."""
    parts, size = [], 0
    for part in response.iter_content(1 << 16):
        size += len(part)
        if size > MAX_DOCUMENT:
            response.close()
            raise TooLong
        parts.append(part)
    response._content = b"".join(parts)
    return response


def _status(response: requests.Response) -> str:
    return f"{response.status_code} {response.reason or ''}".strip()


def _message(response: requests.Response) -> str:
    """What a registry says of an error, in brackets, or nothing."""
    try:
        said = response.json()["errors"][0]["message"]
    except Exception:  # whatever an answer holds that is not the registry's own
        return ""
    line = " ".join(str(said).split())[:200]
    return f" ({line})" if line.isprintable() and line else ""


def _retry_after(response: requests.Response) -> float | None:
    try:
        return max(0.0, float(response.headers["Retry-After"]))
    except (KeyError, ValueError):
        return None


def _chain(error: BaseException) -> list[str]:
    """What an error says and what those say that it stems from, the outermost first."""
    found: list[str] = []
    current: BaseException | None = error
    while current is not None and len(found) < 10:
        found.append(f"{type(current).__name__}: {current}")
        inner = getattr(current, "reason", None) or (current.args[0] if current.args else None)
        current = inner if isinstance(inner, BaseException) else current.__cause__ or current.__context__
    last = found[-1].partition(": ")[2]
    return [*found, " ".join(last.split())[:160] or type(error).__name__]
