"""The base network θ⁰: load, trace, feature output, tensor roles, BatchNorm folding, ONNX skeleton."""
