"""The only place that speaks torch_npu. Importing this package does not import it yet."""
