"""The graph language: typed immutable graphs, an op vocabulary with references, rewriting."""

from __future__ import annotations

from penstock.ir.graph import Graph, Node, Type, Value, leaf, tensor
from penstock.ir.op import emit

__all__ = ["Graph", "Node", "Type", "Value", "emit", "leaf", "tensor"]
