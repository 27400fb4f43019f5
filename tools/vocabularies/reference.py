"""llama.cpp's tokens of texts: `reference.py MODEL` reads a JSON string a line on stdin, writes a JSON list a line.

A process of its own, since llama.cpp ends the process where it refuses a vocabulary."""
import json
import os
import sys
import urllib.request


def main(path):
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp writes to stdout
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = 1
    params.verbosity = 5  # the log lists the tokens that end a generation
    params.port = 20000 + os.getpid() % 20000
    server = xllamacpp.Server(params)
    for line in sys.stdin:
        body = {"content": json.loads(line), "add_special": True, "parse_special": True}
        request = urllib.request.Request(
            server.listening_address + "/tokenize",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            answers.write(json.dumps(json.load(answer)["tokens"]) + "\n")
        answers.flush()
    os._exit(0)  # the server's threads do not end by themselves


main(sys.argv[1])
