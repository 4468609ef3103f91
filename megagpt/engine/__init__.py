"""DeepSpeed: the only package that imports it or knows its internals."""
