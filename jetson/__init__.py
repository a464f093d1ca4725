"""The Jetson half: what the device needs beside the runtime."""
