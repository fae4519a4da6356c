"""Starts the server of a bundle on a machine without a network, asks once, prints the answer: ask_server.py PROMPT.

A fresh network namespace has its loopback device down, and Debian's smallest root no `ip` to bring it up.
"""

import fcntl
import json
import socket
import struct
import subprocess
import sys
import time
import urllib.request

SIOCSIFFLAGS, IFF_UP = 0x8914, 1
URL = "http://127.0.0.1:8123/v1"

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as device:
    fcntl.ioctl(device, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))
server = subprocess.Popen(["demo/run", "serve", "--port", "8123"], stdout=subprocess.DEVNULL)
try:
    for _ in range(300):
        try:
            urllib.request.urlopen(f"{URL}/models").close()
            break
        except OSError:
            time.sleep(1)
    body = json.dumps({"prompt": sys.argv[1], "max_tokens": 12, "temperature": 0}).encode()
    asked = urllib.request.Request(f"{URL}/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked) as answer:
        print(json.load(answer)["choices"][0]["text"])
finally:
    server.terminate()
    server.wait()
