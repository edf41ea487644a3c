"""Convert published tools of many forms to the form that chat templates expect: OpenAI functions with JSON schemas."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rest_rl.data.reading import load_json
from rest_rl.data.reasons import RowRejectedError

_TYPE_NAMES = {
    "str": "string", "string": "string", "text": "string", "int": "integer", "integer": "integer", "long": "integer",
    "float": "number", "double": "number", "number": "number", "bool": "boolean", "boolean": "boolean",
    "list": "array", "array": "array", "tuple": "array", "set": "array", "sequence": "array",
    "dict": "object", "object": "object", "mapping": "object", "none": "null", "null": "null", "nonetype": "null",
}  # fmt: skip
_PARAMETERS = ("parameters", "arguments", "input_schema", "input_parameters")
_GENERIC = re.compile(r"(\w+)\s*[\[(](.*)[\])]\Z", re.DOTALL)


def _bad(detail: str) -> RowRejectedError:
    return RowRejectedError("bad_tool_schema", detail)


def read_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Return the tools of a row, given as a list, as JSON text, as a single tool, or None.

    Raises:
        RowRejectedError: A tool has no valid schema (`bad_tool_schema`).
    """
    value = _json_text(value, "tools")
    if value is None:
        return ()
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise _bad(f"tools is of type {type(value).__name__}, expected a list")
    return tuple(read_tool(_json_text(tool, f"tool {n}"), f"tool {n}") for n, tool in enumerate(value, 1))


def _json_text(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return load_json(value) if value.strip() else None
    except ValueError as error:
        raise _bad(f"{where} is the text {value[:80]!r}, which is not JSON ({error})") from error


def read_tool(raw: Any, where: str) -> dict[str, Any]:
    """Return a tool (bare or in {"type": "function"}) with JSON schema's type names; `where` is for error messages.

    Everything else stays as it is, including the order of keys and missing descriptions. A chat template renders the
    tool as given, and so will the server that uses the trained model.
    """
    function = raw.get("function", raw) if isinstance(raw, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name.strip():
        raise _bad(f"{where} is {repr(raw)[:80]}, expected an object with a name")
    description = function.get("description") or ""
    if not isinstance(description, str):
        raise _bad(f"the description of {where} is of type {type(description).__name__}, expected text")
    if function is raw:
        function = {key: value for key, value in raw.items() if (key, value) != ("type", "function")}
        return {"type": "function", "function": _read_function(function, f"tool {name!r}")}
    kept = raw if "type" in raw else {"type": "function", **raw}
    return {**kept, "type": "function", "function": _read_function(function, f"tool {name!r}")}


def _read_function(function: Mapping[str, Any], where: str) -> dict[str, Any]:
    given = next((key for key in _PARAMETERS if function.get(key) is not None), None)
    value = _json_text(function[given], f"the parameters of {where}") if given else None
    schema = _parameters(value, where, function.get("required"))
    read: dict[str, Any] = {}
    for key, item in function.items():
        if key == given:
            read["parameters"] = schema
        elif key == "description":
            read[key] = item or ""
        elif key not in (*_PARAMETERS, "required"):
            read[key] = item
    return read


def _parameters(value: Any, where: str, required: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping | None):
        raise _bad(f"the parameters of {where} are of type {type(value).__name__}, expected an object")
    if not value:
        return {}
    if not isinstance(value.get("properties"), Mapping) and value.get("type") not in ("object", "dict"):
        if all(isinstance(argument, Mapping) for argument in value.values()):
            return argument_table(value, where)
        raise _bad(f"the parameters of {where} are {repr(dict(value))[:80]}, expected a schema")
    schema = _schema(value, where)
    if "required" not in schema and isinstance(required, Sequence) and not isinstance(required, str) and required:
        schema["required"] = [name for name in required if isinstance(name, str)]
    return schema


def argument_table(arguments: Mapping[str, Any], where: str, *, required: bool = True) -> dict[str, Any]:
    """Convert arguments {name: {"type": "str, optional", "description": ..., "default": ...}} to a JSON schema.

    With `required`, an argument is required unless its type says `optional` or it has a default. Pass False for
    ToolRL (every argument has a default) and API-Bank (none has), which do not say which arguments are required.
    """
    properties: dict[str, Any] = {}
    needed: list[str] = []
    for name, argument in arguments.items():
        if not isinstance(argument, Mapping):
            raise _bad(f"argument {name!r} of {where} is {argument!r:.80}, expected an object")
        properties[name] = _schema(argument, f"{where}, argument {name!r}")
        is_optional = "optional" in str(argument.get("type", "")).lower() or "default" in argument
        needed += [] if is_optional or argument.get("required") is False else [name]
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    return {**schema, "required": needed} if required and needed else schema


def _schema(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    # Copies a schema in its order of keys and goes down into `properties` and `items`. Only type names change, for
    # example "dict" to "object". A name without a counterpart in JSON schema moves into the description, so that the
    # model still sees it. Keys that a type implies (the `items` of "List[int]") never replace keys of the schema.
    schema: dict[str, Any] = {}
    for key, item in value.items():
        if key == "type":
            found = _types(item, where)
            schema |= {name: part for name, part in found.items() if name == "type" or name not in value}
        elif key == "properties" and item is not None:
            if not isinstance(item, Mapping) or not all(isinstance(each, Mapping) for each in item.values()):
                raise _bad(f"the properties of {where} are {item!r:.80}, expected schemas by name")
            schema[key] = {name: _schema(each, f"{where}.{name}") for name, each in item.items()}
        elif key == "items" and isinstance(item, Mapping):
            schema[key] = _schema(item, f"{where}[]")
        elif key in ("required", "enum"):
            schema |= _names_or_values(key, item, where)
        else:
            schema[key] = item
    kind = value.get("type")
    if isinstance(kind, str) and "type" not in schema:
        schema["description"] = f"{value.get('description') or ''} ({kind})".strip()
    return schema


def _names_or_values(key: str, value: Any, where: str) -> dict[str, Any]:
    # Some data sets mark a single argument with `required: true`; JSON schema lists names in the parent instead.
    is_list = isinstance(value, list | tuple)
    if is_list and (key == "enum" or all(isinstance(name, str) for name in value)):
        return {key: list(value)}
    if value is None or (key == "required" and isinstance(value, bool)):
        return {}
    raise _bad(f"{key} of {where} is {value!r:.80}, expected a list")


def _types(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, str):
        return {"type": _TYPE_NAMES[value]} if value in _TYPE_NAMES else json_type(value)
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return {"type": [_TYPE_NAMES.get(item.lower(), item) for item in value]}
    if value is None:
        return {}
    raise _bad(f"the type of {where} is {value!r:.80}, expected the name of a type")


def json_type(text: str) -> dict[str, Any]:
    """Return the schema of an informal type such as `str, optional`, `List[int]` or `list(str)`; {} if unknown.

    >>> json_type("List[Union[int, float]], optional")
    {'type': 'array', 'items': {'type': 'number'}}
    """
    # Recursive descent over `Outer[Inner, ...]` or `outer(inner)`. An unknown name gives {}, which accepts anything: a
    # schema that is too loose only misses findings, and one that is wrong would reject good rows.
    name = re.sub(r",?\s*optional\s*$", "", text.strip(), flags=re.IGNORECASE).strip()
    if name.startswith("[") and (names := re.findall(r"'(\w+)'", name)):
        return {"type": [_TYPE_NAMES.get(one.lower(), one) for one in names]}
    if name.lower() in _TYPE_NAMES:
        return {"type": _TYPE_NAMES[name.lower()]}
    generic = _GENERIC.match(name)
    if generic is None or len(name) > 500:  # long text is no type, and could nest deeper than the recursion limit
        return {}
    outer, inner = generic[1].lower(), generic[2]
    if outer == "optional":
        return json_type(inner)
    kinds = [json_type(part) for part in _parts(inner) if part != "..."]
    if outer == "union":
        return _union(kinds)
    if outer not in _TYPE_NAMES:
        return {}
    items = _union(kinds) if _TYPE_NAMES[outer] == "array" else {}
    return {"type": _TYPE_NAMES[outer], **({"items": items} if items else {})}


# Splits at the commas outside brackets.
def _parts(text: str) -> list[str]:
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[(") - (character in "])")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _union(kinds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    # Integer and number merge into number; {} accepts anything, so any {} makes the union {}.
    distinct = [dict(kind) for index, kind in enumerate(kinds) if kind not in kinds[:index]]
    if not all(distinct):
        return {}
    if len(distinct) > 1 and all(kind.get("type") in ("integer", "number") for kind in distinct):
        return {"type": "number"}
    if len(distinct) == 1:
        return distinct[0]
    names = [kind.get("type") for kind in distinct]
    return {"type": names} if all(isinstance(name, str) for name in names) else {}
