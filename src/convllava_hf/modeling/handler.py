# SPDX-License-Identifier: Apache-2.0
"""`EndpointHandler` for Hugging Face Inference Endpoints: a ConvLLaVA behind HTTP.

A request's body is `{"inputs": ..., "parameters": {...}}`. `inputs` is one of
- `{"image": IMAGE, "question": TEXT}`, where `image` may also be a list of images,
- a chat: `[{"role": "user", "content": ...}, ...]`, or `{"messages": [...]}`. Content is a text or a list of parts,
  `{"type": "text", "text": TEXT}`, `{"type": "image", "image": IMAGE}` or OpenAI's
  `{"type": "image_url", "image_url": {"url": IMAGE}}`,
- a text, a question without images,
- a list of these: several inputs, each with an answer of its own.
A IMAGE is a URL (http or https), base64, or a data URL of base64. Nothing is read from the endpoint's own disk.

An answer has `generated_text`, `finish_reason` ("stop" or "length"), `prompt_tokens`, `visual_tokens` (a part of them)
and `generated_tokens`. What cannot be answered gives `{"error": TEXT, "status": NUMBER}`, the number being HTTP's for
the reason; the inference toolkit sends it in a body with 200, for it would make 400 of anything raised. Several inputs
give a list, in which an error takes the place of its own answer alone.

Images are fetched from public addresses alone, without proxies. A host's name is resolved once, and the connection
goes to the address that was checked.
"""

import base64
import binascii
import contextlib
import dataclasses
import http.client
import io
import ipaddress
import logging
import math
import os
import re
import reprlib
import socket
import ssl
import threading
import time
from urllib.parse import quote, urljoin, urlsplit

import torch
from PIL import Image, UnidentifiedImageError
from transformers import AutoModelForImageTextToText, AutoProcessor


try:
    import certifi
except ImportError:  # the system's certificates alone
    certifi = None
try:
    from jinja2 import TemplateError
except ImportError:  # without it no chat template can be written at all
    TemplateError = ValueError

logger = logging.getLogger(__name__)

# The image processor's own list; PIL would hand an EPS to Ghostscript.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
_CONNECT_SECONDS = 5.0  # to one address; then the next is tried
_REDIRECTS = (301, 302, 303, 307, 308)
_PRIVATE_USE = re.compile("[\U000f0000-\U000fffff]")  # transformers marks with these what a user typed
_SURROGATE = re.compile("[\ud800-\udfff]")  # which JSON can write alone, and UTF-8 and tokenizers cannot
# What a chat template raises of messages that it does not expect: its own errors and those of Python's operators.
_REFUSED = (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # IPv6 outside of it is no host's or wraps an IPv4 address
# Beyond what `is_global` knows: protocol assignments (older Pythons let some pass), the two ways to wrap an IPv4
# address that are global themselves, 6to4's relays, and the address at which Azure's host answers its machines.
_NOT_PUBLIC = [
    ipaddress.ip_network(network)
    for network in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "2001::/23", "2002::/16")
]
# Name: type, least and greatest value of what a request may set. `max_new_tokens` is bounded by the limits too.
_PARAMETERS = {
    "max_new_tokens": (int, 1, math.inf),
    "do_sample": (bool, False, True),
    "temperature": (float, 0.0, 10.0),
    "top_p": (float, 1e-6, 1.0),
    "top_k": (int, 0, 10**6),
    "repetition_penalty": (float, 0.1, 10.0),
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may cost; an endpoint's environment sets them: `CONVLLAVA_MAX_PIXELS` for `max_pixels`.

    `max_pixels`, `max_bytes` and `fetch_seconds` are for all images of one input together: pixels after decoding,
    bytes before it, seconds until the last one is there, with all redirects. Pixels are counted by the bytes that
    decoding them takes: those of more than 8 bits a channel count twice, those of JPEG 2000 four times. PIL itself
    opens no image of more than about 179 million pixels.
    """

    max_inputs: int = 8
    max_messages: int = 256  # of one input, as are the next two
    max_characters: int = 200_000
    max_images: int = 16
    max_pixels: int = 100_000_000
    max_bytes: int = 32 * 2**20
    fetch_seconds: float = 20.0
    max_redirects: int = 3
    max_new_tokens: int = 2048
    default_new_tokens: int = 512  # where a request does not say

    @classmethod
    def from_environment(cls) -> "Limits":
        """The defaults, changed by the environment. Raises `ValueError` for a value that is no number from 1 up."""
        changes = {}
        for field in dataclasses.fields(cls):
            name = f"CONVLLAVA_{field.name.upper()}"
            if text := os.environ.get(name):
                changes[field.name] = _number(name, text, type(field.default), 1, math.inf)
        return cls(**changes)


class RequestError(ValueError):
    """A request that cannot be answered: `status` is the number that HTTP has for the reason."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class EndpointHandler:
    """Answers the requests of an endpoint; see the module for what they look like. Threads may call it at once.

    Args:
        path: folder of the checkpoint, with the code that it was saved with.
    """

    def __init__(self, path: str = ""):
        self.limits = Limits.from_environment()
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        options = {"dtype": torch.float32}
        if torch.cuda.is_available():
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            options = {"dtype": torch.bfloat16 if native else torch.float16, "device_map": "auto"}
        self.model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True, **options).eval()
        tokenizer = self.processor.tokenizer
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= {self.processor.image_token, *tokenizer.all_special_tokens}
        tokens = sorted((re.escape(token) for token in special if token.strip()), key=len, reverse=True)
        self._special = re.compile("|".join(tokens))
        # One request at a time has decoded images or uses the tokenizer, which is not for several threads; another
        # one meanwhile has the model. Downloads wait for neither.
        self._preparing = threading.Lock()
        self._generating = threading.Lock()

    def __call__(self, data: dict) -> dict | list[dict]:
        """One answer or error, or a list of them for several inputs. Raises nothing; faults are logged."""
        try:
            inputs, parameters = self._read_request(data)
        except RequestError as error:
            return _as_body(error)
        except RecursionError:
            return _as_body(_too_deep())
        answers = [self._answer(entry, parameters) for entry in (inputs if _is_several(inputs) else [inputs])]
        return answers if _is_several(inputs) else answers[0]

    def _read_request(self, data) -> tuple:
        if not isinstance(data, dict) or "inputs" not in data:
            raise RequestError(400, "The request has no `inputs`: send a JSON object with `inputs` and `parameters`.")
        inputs = data["inputs"]
        if _is_several(inputs) and not 0 < len(inputs) <= self.limits.max_inputs:
            raise RequestError(
                413 if inputs else 400,
                f"The request has {len(inputs)} inputs; 1 to {self.limits.max_inputs} are answered at once.",
            )
        return inputs, _generation_options(data.get("parameters"), self.limits)

    def _answer(self, entry, options: dict) -> dict:
        try:
            messages, sources = _read_conversation(entry, self.limits, self._as_typed)
            reader = _ImageReader(self.limits)
            files = [reader.read(source) for source in sources]
            with self._preparing:
                images = [reader.decode(file, source) for file, source in zip(files, sources, strict=True)]
                inputs = self._prepare(messages, iter(images))
                for image in images:  # while the model is waited for, their pixels need not be there
                    image.close()
            del files
            return self._generate(inputs, options)
        except RequestError as error:
            return _as_body(error)
        except RecursionError:
            logger.warning("A request was too deep for Python's stack.")
            return _as_body(_too_deep())
        except torch.OutOfMemoryError:
            logger.exception("A request did not fit into memory.")
            torch.cuda.empty_cache()
            return {"error": "The memory does not hold this request. Ask about fewer images.", "status": 503}
        except Exception:  # the next request must be answered whatever this one came upon
            logger.exception("A request could not be answered.")
            return {"error": "The endpoint failed on this request; its log says how.", "status": 500}

    def _as_typed(self, text: str) -> str:
        """Text that holds no special token: a blank parts each, so that `<image>` stays text and ends no turn."""
        return self._special.sub(lambda match: f"{match[0][:1]} {match[0][1:]}", _PRIVATE_USE.sub("", text))

    def _prepare(self, messages: list[dict], images):
        """The model's inputs; `images` are those that the messages leave places for, in order."""
        for message in messages:
            for part in message["content"]:
                if part["type"] == "image":
                    part["image"] = next(images)
        try:
            return self.processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        except _REFUSED as error:  # of roles in an order that the language model does not know, say
            if type(error).__name__ == "ImageError":  # of the image processor, whose code came with the checkpoint
                raise RequestError(415, str(error)) from error
            logger.warning("A conversation could not be written.", exc_info=True)
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise RequestError(400, f"The conversation cannot be written for this model: {reason}") from error

    @torch.inference_mode()
    def _generate(self, inputs, options: dict) -> dict:
        prompt = inputs["input_ids"].shape[1]
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        if prompt >= context:
            raise RequestError(
                413,
                f"The conversation has {prompt} tokens and the model's context holds {context}, the answer included. "
                "Leave out earlier messages, or ask about fewer images.",
            )
        visual = int((inputs["input_ids"] == self.model.config.image_token_id).sum())
        options = {**options, "max_new_tokens": int(min(options["max_new_tokens"], context - prompt))}
        with self._generating:
            output = self.model.generate(**inputs.to(self.model.device, self.model.dtype), **options)
        ids = output[0, prompt:].tolist()
        with self._preparing:
            text = self.processor.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ends = self.model.generation_config.eos_token_id
        ended = ids[-1:] and ids[-1] in (ends if isinstance(ends, list) else [ends])
        return {
            "generated_text": text,
            "finish_reason": "stop" if ended else "length",
            "prompt_tokens": prompt,
            "visual_tokens": visual,
            "generated_tokens": len(ids),
        }


def _as_body(error: RequestError) -> dict:
    return {"error": str(error), "status": error.status}


def _too_deep() -> RequestError:
    return RequestError(400, "The request nests lists or objects too deep.")


def _is_several(inputs) -> bool:
    """Whether it is a list of inputs; a list of messages is one."""
    return isinstance(inputs, list) and not (inputs and all(isinstance(m, dict) and "role" in m for m in inputs))


def _generation_options(parameters, limits: Limits) -> dict:
    """What `generate` is told; sampling is as the checkpoint's generation_config.json has it, unless asked for."""
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, dict):
        raise RequestError(400, "`parameters` must be a JSON object.")
    if unknown := sorted(set(map(str, parameters)) - set(_PARAMETERS)):
        raise RequestError(400, f"Unknown parameters: {_shown(unknown)}. Known are {', '.join(_PARAMETERS)}.")
    options = {"max_new_tokens": min(limits.default_new_tokens, limits.max_new_tokens)}
    for name, value in parameters.items():
        kind, least, greatest = _PARAMETERS[name]
        if name == "max_new_tokens":
            greatest = limits.max_new_tokens
        try:
            options[name] = _number(name, value, kind, least, greatest)
        except ValueError as error:
            raise RequestError(400, str(error)) from error
    sampling = ("temperature", "top_p", "top_k")
    # Divided by less, logits overflow, and on a GPU that would end all answering, not this request's alone.
    if options.get("temperature", 1.0) < 0.01:
        options["do_sample"] = False
    elif any(name in options for name in sampling):
        options.setdefault("do_sample", True)
    if options.get("do_sample") is False:
        options |= dict.fromkeys(sampling)
    return options


def _number(name: str, value, kind: type, least, greatest):
    """`value` as `kind`; an endpoint's query string gives numbers as text."""
    expected = "true or false" if kind is bool else f"{'a whole' if kind is int else 'a'} number"
    if kind is not bool:
        expected += f" from {least} up" if greatest == math.inf else f" from {least} to {greatest}"
    try:
        if isinstance(value, bool) is not (kind is bool):
            raise ValueError
        number = kind(value)
        # A float is no whole number even if it could be one; NaN is in no range.
        if (kind is int and isinstance(value, float)) or not least <= number <= greatest or number == math.inf:
            raise ValueError
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} is {_shown(value)}; expected {expected}.") from error
    return number


def _read_conversation(entry, limits: Limits, as_typed) -> tuple[list[dict], list[str]]:
    """Messages with places for images, and where the images are to be had."""
    messages = _as_messages(entry)
    if not messages or len(messages) > limits.max_messages:
        raise RequestError(
            413 if messages else 400,
            f"The chat has {len(messages)} messages; 1 to {limits.max_messages} are read. Leave out earlier ones.",
        )
    read, sources, characters = [], [], 0
    for number, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("user", "assistant") and not (role == "system" and number == 1):
            raise RequestError(
                400,
                f"Message {number} has the role {_shown(role)}; expected user or assistant, and system for the first.",
            )
        content = []
        for kind, value in _parts(message.get("content"), number):
            if kind == "image":
                sources.append(value)
                content.append({"type": "image"})
            else:
                characters += len(value)
                content.append({"type": "text", "text": as_typed(value)})
        read.append({"role": role, "content": content})
    if read[-1]["role"] != "user":
        raise RequestError(400, "The last message must be the user's: it is the one that is answered.")
    if not read[-1]["content"]:
        raise RequestError(400, "The last message is empty: it needs a text or an image.")
    if characters > limits.max_characters:
        raise RequestError(413, f"The texts have {characters} characters; {limits.max_characters} are read.")
    if len(sources) > limits.max_images:
        raise RequestError(413, f"There are {len(sources)} images; {limits.max_images} are looked at together.")
    return read, sources


def _as_messages(entry) -> list:
    if isinstance(entry, str):
        return [{"role": "user", "content": entry}]
    if isinstance(entry, list):
        return entry
    if isinstance(entry, dict) and isinstance(entry.get("messages"), list):
        return entry["messages"]
    if not isinstance(entry, dict) or not {"image", "question"} & set(entry):
        raise RequestError(
            400, "An input is an object with `image` and `question`, a list of chat messages with `role`, or a text."
        )
    if not entry.get("image"):
        raise RequestError(400, "There is no image in `image`. A question without images is a text or a chat.")
    if not isinstance(entry.get("question"), str) or not entry["question"].strip():
        raise RequestError(400, "There is no text in `question`.")
    images = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": entry["question"]}]}]


def _parts(content, number: int) -> list[tuple[str, str]]:
    """Kind and value of each part. Texts in a row become one, for two halves of a special token would become whole."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise RequestError(400, f"Message {number} has the content {_shown(content)}; expected a text or a list.")
    parts: list[tuple[str, str]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            value = part.get("text")
        elif kind in ("image", "image_url"):
            value = next((part[name] for name in ("image", "url", "base64", "image_url") if part.get(name)), None)
            value, kind = value.get("url") if isinstance(value, dict) else value, "image"
        else:
            raise RequestError(400, f"Message {number} has a part of type {_shown(kind)}; expected text or image.")
        if not isinstance(value, str):
            wanted = "text" if kind == "text" else "URL or base64"
            raise RequestError(400, f"Message {number} has a part of type {kind} without a {wanted}.")
        if half := _SURROGATE.search(value):
            raise RequestError(
                400, f"Message {number} has a part of type {kind} with half a surrogate pair, {_shown(half[0])}."
            )
        if kind == "text" and parts and parts[-1][0] == "text":
            parts[-1] = ("text", parts[-1][1] + value)
        elif value or kind == "image":
            parts.append((kind, value))
    return parts


class _ImageReader:
    """Reads the images of one input, within its limits of bytes, time and pixels."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.bytes_left = limits.max_bytes
        self.pixels_left = limits.max_pixels
        self.deadline = time.monotonic() + limits.fetch_seconds

    def read(self, source: str) -> bytes:
        """The image's file."""
        scheme, colon, rest = source.partition(":")
        if colon and scheme.lower() in ("http", "https"):
            return self._fetch(source)
        if colon and scheme.lower() == "data":
            header, comma, source = rest.partition(",")
            if not comma or not header.lower().endswith(";base64"):
                raise RequestError(400, "A data URL of an image must be of base64: data:image/png;base64,...")
        elif colon:
            raise RequestError(400, f"{_shown(source)} is not fetched: images come by http, https or base64.")
        self._take(len(source) * 3 // 4)
        try:
            return base64.b64decode("".join(source.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise RequestError(
                400, f"{_shown(source)} is neither a URL nor base64. Files of the endpoint are not read."
            ) from error

    def decode(self, file: bytes, source: str) -> Image.Image:
        Image.init()
        try:
            image = Image.open(io.BytesIO(file), formats=[name for name in _FORMATS if name in Image.OPEN])
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise self._too_many_pixels(f"{_shown(source)} has far too many pixels") from error
        except UnidentifiedImageError as error:
            raise RequestError(
                415, f"{_shown(source)} is not an image that can be read; expected one of {', '.join(_FORMATS)}."
            ) from error
        except Exception as error:  # PIL's parsers let through whatever they stumble over
            raise _undecodable(source, error) from error
        width, height = image.size
        weight = _weight_of_pixels(image)
        if weight * width * height > self.pixels_left:
            counted = f", which count {weight} times" if weight > 1 else ""
            raise self._too_many_pixels(f"{_shown(source)} has {width} x {height} pixels{counted}")
        self.pixels_left -= weight * width * height
        try:
            image.load()  # the image processor turns it upright
        except Exception as error:
            raise _undecodable(source, error) from error
        # The image processor makes a square of the longer side. That must keep to the limit as well.
        side = math.isqrt(self.limits.max_pixels)
        if max(image.size) > side:
            smooth = image.mode in ("L", "RGB", "RGBA", "CMYK")
            image.thumbnail((side, side), Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST)
        return image

    def _too_many_pixels(self, what: str) -> RequestError:
        return RequestError(413, f"{what}; {self.limits.max_pixels} are looked at, all images together.")

    def _take(self, size: int) -> None:
        self.bytes_left -= size
        if self.bytes_left < 0:
            raise RequestError(413, f"The images are larger than {self.limits.max_bytes} bytes together.")

    def _fetch(self, url: str) -> bytes:
        shown, redirects = _shown(url), 0
        try:
            while True:
                with _Request(url, self.deadline) as response:
                    if response.status not in _REDIRECTS:
                        return self._body(response, shown)
                    if not (location := response.getheader("Location")):
                        raise RequestError(424, f"The server of {shown} redirects to nowhere.")
                redirects += 1
                if redirects > self.limits.max_redirects:
                    raise RequestError(424, f"{shown} redirects more than {self.limits.max_redirects} times.")
                try:
                    url = urljoin(url, location)
                except ValueError as error:
                    raise RequestError(424, f"{shown} redirects to {_shown(location)}, which is no URL.") from error
        except (OSError, http.client.HTTPException) as error:
            self._check_time(shown)
            raise RequestError(424, f"The image {shown} could not be fetched: {error}") from error

    def _body(self, response: http.client.HTTPResponse, shown: str) -> bytes:
        if response.status != 200:
            raise RequestError(424, f"The server of {shown} answered with status {response.status}.")
        pieces = []
        if response.length and response.length > self.bytes_left:
            self._take(response.length)  # not even begun
        while piece := response.read(2**16):
            self._take(len(piece))
            pieces.append(piece)
        self._check_time(shown)  # a connection ended by the clock looks like the end of the file
        return b"".join(pieces)

    def _check_time(self, shown: str) -> None:
        if time.monotonic() >= self.deadline:
            raise RequestError(424, f"The image {shown} did not arrive within {self.limits.fetch_seconds:g} seconds.")


class _Request:
    """A GET of one URL, as a context manager that gives the response. It follows no redirect, and ends by `deadline`.

    Raises `RequestError` for a URL that is not fetched, `OSError` or `HTTPException` where there is no answer.
    """

    def __init__(self, url: str, deadline: float):
        try:
            parts = urlsplit(url)
            self.is_https = {"http": False, "https": True}[parts.scheme]
            self.host = (parts.hostname or "").encode("ascii" if ":" in (parts.hostname or "") else "idna").decode()
            self.port = parts.port or (443 if self.is_https else 80)
        except (KeyError, ValueError) as error:  # UnicodeError is a ValueError
            raise RequestError(400, f"{_shown(url)} is not fetched: expected a URL of http or https.") from error
        if not self.host:
            raise RequestError(400, f"{_shown(url)} names no host.")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self.path = quote(path, safe="!$%&'()*+,/:;=?@[]~")
        self.url, self.deadline = url, deadline
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> http.client.HTTPResponse:
        try:
            return self._send()
        except BaseException:
            self._closing.close()
            raise

    def __exit__(self, *exception) -> None:
        self._closing.close()

    def _send(self) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(self.host, self.port)
        connection.default_port = 443 if self.is_https else 80  # which the Host header leaves out
        connection.sock = self._closing.enter_context(self._connect())
        headers = {"User-Agent": "convllava-endpoint", "Accept": "image/*", "Accept-Encoding": "identity"}
        connection.request("GET", self.path, headers={**headers, "Connection": "close"})
        return self._closing.enter_context(connection.getresponse())

    def _connect(self) -> socket.socket:
        addresses = [address for address in self._resolve() if _is_public(address)]
        if not addresses:
            raise RequestError(403, f"{_shown(self.url)} is not fetched: its host has no public address.")
        for number, address in enumerate(addresses[:3], 1):
            try:
                # A number has nothing to resolve, so this cannot lead elsewhere than to what was checked.
                connected = socket.create_connection((address, self.port), min(_CONNECT_SECONDS, self._seconds_left()))
                break
            except OSError:
                if number == len(addresses[:3]):
                    raise
        self._closing.enter_context(connected)
        connected.settimeout(self._seconds_left())
        self._end_in_time(connected)
        if not self.is_https:
            return connected
        context = ssl.create_default_context()
        if certifi is not None:
            context.load_verify_locations(certifi.where())
        return context.wrap_socket(connected, server_hostname=self.host)

    def _resolve(self) -> list[str]:
        """All addresses of the host. The system's resolver knows no time limit, so it is left alone when ours ends."""
        found: list = []

        def resolve() -> None:
            try:
                found.append([entry[4][0] for entry in socket.getaddrinfo(self.host, None, type=socket.SOCK_STREAM)])
            except (OSError, UnicodeError) as error:
                found.append(error)

        thread = threading.Thread(target=resolve, daemon=True)
        thread.start()
        thread.join(self._seconds_left())
        if not found or isinstance(found[0], Exception):
            raise OSError("the host's name cannot be resolved")
        return list(dict.fromkeys(found[0]))

    def _end_in_time(self, connected: socket.socket) -> None:
        """Ends the connection at the deadline; with limits on each read a server could send a byte now and then."""
        handle = self._closing.enter_context(connected.dup())  # TLS takes the socket itself over

        def end() -> None:
            with contextlib.suppress(OSError):
                handle.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(self._seconds_left(), end)
        timer.daemon = True
        timer.start()
        self._closing.callback(timer.cancel)

    def _seconds_left(self) -> float:
        return max(self.deadline - time.monotonic(), 0.001)


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6 and ip not in _GLOBAL_UNICAST:
        return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _NOT_PUBLIC)


def _weight_of_pixels(image: Image.Image) -> int:
    """How many bytes a pixel takes while it is decoded, compared with one of 8 bits a channel."""
    if image.format == "JPEG2000":  # 32 bits a channel, and work besides
        return 4
    stored = str([tile[3] for tile in image.tile])  # RGB;16B, say, which becomes 8 bits
    return 2 if image.mode == "F" or image.mode.startswith("I") or ";16" in stored else 1


def _undecodable(source: str, error: Exception) -> RequestError:
    return RequestError(415, f"The image {_shown(source)} cannot be decoded: {error}")


def _shown(value) -> str:
    """A value for a message, not too long and without a data URL's data."""
    try:
        text = repr(value) if isinstance(value, str) else reprlib.repr(value)  # which goes six levels deep
    except ValueError:  # an integer of more digits than Python writes
        text = f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:60]}..."
