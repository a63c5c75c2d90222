"""Run beside a real TensorRT binding: hold what is asked for on stdin (JSON) to it; print what is wrong (JSON).

A program of its own, since a process can load one version only. It reads the signatures that pybind11 writes into the
docstrings, as the libraries behind the bindings are stubs and nothing can be called.
"""

import json
import re
import sys


def signatures(function):
    """Return the parameters of each overload without self: lists of (name, is optional); None where it says nothing."""
    lines = (function.__doc__ or '').splitlines()
    name = re.escape(function.__name__)
    heads = [line for line in lines if re.match(rf'(\d+\. )?{name}\(self', line)]
    return [_parameters(head) for head in heads] or None


def _parameters(head):
    depth, parts, text = 0, [''], head[head.index('(') + 1 :]
    for char in text:
        if char == ')' and not depth:
            break
        depth += (char in '[(<{') - (char in '])>}')
        if char == ',' and not depth:
            parts.append('')
        else:
            parts[-1] += char
    return [(part.split(':')[0].strip(), '=' in part) for part in parts[1:]]


def find(module, path):
    """Return the object of a dotted name, or None."""
    for part in path.split('.'):
        module = getattr(module, part, None)
    return module


def problems(trt, asked):
    """Yield a line for each name, call and method that the binding does not have."""
    for path in asked['names']:
        if find(trt, path) is None:
            yield f'there is no {path}'
    for path, count, keywords in asked['calls']:
        function = find(trt, path)
        if function is None:
            yield f'there is no {path}'
            continue
        known = signatures(function)
        if known is not None and not any(_takes(one, count, keywords) for one in known):
            yield f'{path} does not take {count} arguments and {keywords}; it takes {known}'
    for path, names in asked['methods']:
        function = find(trt, path)
        if function is None:
            yield f'there is no {path}'
            continue
        known = signatures(function)
        if known is not None and not any([name for name, _ in one] == names for one in known):
            yield f'{path} has not the parameters {names}; it has {known}'


def _takes(parameters, count, keywords):
    names = [name for name, _ in parameters]
    needed = [name for name, optional in parameters[count:] if not optional]
    left = names[count:]
    return count <= len(names) and set(keywords) <= set(left) and set(needed) <= set(keywords)


if __name__ == '__main__':
    import tensorrt_bindings

    asked = json.load(sys.stdin)
    found = list(problems(tensorrt_bindings, asked))
    json.dump({'version': tensorrt_bindings.__version__, 'problems': found}, sys.stdout)
