"""The container of the device: built without network, run without rights, healthy only when the runtime is ready."""
