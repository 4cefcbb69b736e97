"""The names of ComfyUI that a module uses, read from its source."""

from __future__ import annotations

import ast

HOST = ("comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "latent_preview")


def host_names(source: str) -> set[str]:
    """Dotted names of ComfyUI in a module: what it imports, and what it takes from that."""
    tree = ast.parse(source)
    known: dict[str, str] = {}  # a local name, and what it stands for
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in HOST:
                    found.add(alias.name)
                    local = alias.asname or alias.name.split(".")[0]
                    known[local] = alias.name if alias.asname else local
        elif isinstance(node, ast.ImportFrom) and _of_host(node):
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                found.add(f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id in known:
            found.add(".".join([known[node.id], *reversed(parts)]))
    return found


def _of_host(node: ast.ImportFrom) -> bool:
    return node.level == 0 and str(node.module).split(".")[0] in HOST


def not_imported(source: str) -> set[str]:
    """Names that are used though the module imports nothing that is sure to bring them.

    `import comfy.a` does not import `comfy.b`, though it works once somebody else has.
    """
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and _of_host(node):
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {
        name
        for name in host_names(source)
        if not any(f"{name}.".startswith(f"{i}.") or i.startswith(f"{name}.") for i in imported)
    }
