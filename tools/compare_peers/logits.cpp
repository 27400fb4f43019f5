// The logits that llama.cpp computes token by token, for `examples/accuracy.rs --llama`:
//
//     llama-logits MODEL.gguf TOKENS KV-TYPE THREADS OUTPUT
//
// TOKENS has a sequence of token ids a line. OUTPUT gets the vocabulary's logits at every position as raw f32, one
// sequence after the other. README.md, beside this file, says how it is compiled.

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "llama.h"

static void fail(const std::string & what) {
    std::fprintf(stderr, "llama-logits: %s\n", what.c_str());
    std::exit(1);
}

static ggml_type kv_type(const std::string & name) {
    for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        if (name == ggml_type_name(type)) {
            return type;
        }
    }
    fail("KV type " + name + ": one of f32, f16, q8_0");
    return GGML_TYPE_F32;
}

int main(int argc, char ** argv) {
    if (argc != 6) {
        fail("arguments: MODEL.gguf TOKENS KV-TYPE THREADS OUTPUT");
    }
    std::vector<std::vector<llama_token>> sequences;
    size_t longest = 1;
    std::ifstream input(argv[2]);
    for (std::string line; std::getline(input, line);) {
        std::istringstream ids(line);
        std::vector<llama_token> sequence;
        for (llama_token id; ids >> id;) {
            sequence.push_back(id);
        }
        longest = sequence.size() > longest ? sequence.size() : longest;
        sequences.push_back(sequence);
    }
    if (sequences.empty()) {
        fail(std::string("no tokens in ") + argv[2]);
    }

    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) {
            std::fputs(text, stderr);
        }
    }, nullptr);
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) {
        fail(std::string("cannot load ") + argv[1]);
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx = longest;
    params.type_k = params.type_v = kv_type(argv[3]);
    if (params.type_k == GGML_TYPE_F32) {
        // It would round keys and values to F16.
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    }
    params.n_threads = params.n_threads_batch = std::atoi(argv[4]);
    llama_context * context = llama_init_from_model(model, params);
    if (!context) {
        fail("cannot make a context");
    }
    const size_t vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));

    FILE * output = std::fopen(argv[5], "wb");
    if (!output) {
        fail(std::string("cannot write ") + argv[5]);
    }
    for (std::vector<llama_token> & sequence : sequences) {
        llama_memory_clear(llama_get_memory(context), true);
        for (llama_token & token : sequence) {
            if (llama_decode(context, llama_batch_get_one(&token, 1)) != 0) {
                fail("llama_decode failed");
            }
            if (std::fwrite(llama_get_logits_ith(context, -1), sizeof(float), vocab, output) != vocab) {
                fail(std::string("cannot write ") + argv[5]);
            }
        }
    }
    if (std::fclose(output) != 0) {
        fail(std::string("cannot write ") + argv[5]);
    }
    llama_free(context);
    llama_model_free(model);
    return 0;
}
