// Runs a SavedModel by TensorFlow's C API, without Python:
//
//   serve SAVED_MODEL INPUT OUTPUT [LIBRARY]
//
// INPUT and OUTPUT are the names of tensors, as `saved_model_cli show` prints them
// ("serving_default_image:0", "StatefulPartitionedCall:0"). LIBRARY is what
// `cbam-ops info --ops-library` prints: a SavedModel with fused ops needs it. The program reads
// float32 maps [1, 32, 32, 3] from its standard input and writes what the model makes of each.
// How it is built: docs/exporting.md.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tensorflow/c/c_api.h>

enum { kHeight = 32, kWidth = 32, kChannels = 3, kSize = kHeight * kWidth * kChannels };

static void check(const TF_Status* status, const char* what) {
  if (TF_GetCode(status) != TF_OK) {
    fprintf(stderr, "%s: %s\n", what, TF_Message(status));
    exit(1);
  }
}

// "name:index" as an output of the graph.
static TF_Output tensor_named(TF_Graph* graph, char* name) {
  char* colon = strrchr(name, ':');
  TF_Output output = {NULL, 0};
  if (colon != NULL) {
    *colon = '\0';
    output.index = atoi(colon + 1);
  }
  output.oper = TF_GraphOperationByName(graph, name);
  if (output.oper == NULL) {
    fprintf(stderr, "the graph has no operation %s\n", name);
    exit(1);
  }
  return output;
}

int main(int argc, char** argv) {
  if (argc < 4) {
    fprintf(stderr, "usage: serve SAVED_MODEL INPUT OUTPUT [LIBRARY]\n");
    return 2;
  }
  TF_Status* status = TF_NewStatus();
  if (argc > 4) {
    TF_LoadLibrary(argv[4], status);
    check(status, argv[4]);
  }
  TF_Graph* graph = TF_NewGraph();
  TF_SessionOptions* options = TF_NewSessionOptions();
  const char* tags[] = {"serve"};
  TF_Session* session =
      TF_LoadSessionFromSavedModel(options, NULL, argv[1], tags, 1, graph, NULL, status);
  check(status, argv[1]);
  const TF_Output input = tensor_named(graph, argv[2]), output = tensor_named(graph, argv[3]);

  const int64_t shape[] = {1, kHeight, kWidth, kChannels};
  TF_Tensor* x = TF_AllocateTensor(TF_FLOAT, shape, 4, kSize * sizeof(float));
  while (fread(TF_TensorData(x), sizeof(float), kSize, stdin) == kSize) {
    TF_Tensor* y = NULL;
    TF_SessionRun(session, NULL, &input, &x, 1, &output, &y, 1, NULL, 0, NULL, status);
    check(status, "a run");
    fwrite(TF_TensorData(y), 1, TF_TensorByteSize(y), stdout);
    TF_DeleteTensor(y);
  }
  TF_DeleteTensor(x);
  TF_CloseSession(session, status);
  TF_DeleteSession(session, status);
  TF_DeleteSessionOptions(options);
  TF_DeleteGraph(graph);
  TF_DeleteStatus(status);
  return 0;
}
