# SPDX-License-Identifier: Apache-2.0
"""Runs what comes over the network of the servers, as an operator's ssh would: a connection is a
script, and gets what that says, and its status in the last line.
"""

import socketserver
import subprocess
import sys


class Script(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        script = self.rfile.read()
        done = subprocess.run(
            ["bash", "-s"], input=script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.wfile.write(done.stdout + b"\n%d" % done.returncode)


if __name__ == "__main__":
    with socketserver.ThreadingTCPServer(("", int(sys.argv[1])), Script) as server:
        server.serve_forever()
