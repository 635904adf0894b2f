// contextrast: exact edge distances and hard-negative selection for label maps. Plain C interface of the native
// library.
//
// Every function but contextrast_interface and contextrast_cuda_status comes twice: `_cpu` takes a number of threads,
// `_cuda` a device index and a stream on which it only enqueues work. None allocates device memory, keeps state between
// calls or waits for the device: the caller passes scratch of at least the size that the matching `_scratch_` function
// returns (any content, aligned to 16 bytes), and outputs, which are contiguous and, unless a comment says otherwise,
// wholly written. A `_scratch_cpu` function must be given the same number of threads. Inputs may have any strides and
// are never copied; no value in them can cause an access out of bounds.
//
// A function with an argument `error` returns CONTEXTRAST_OK, or another code and a message in `error`,
// CONTEXTRAST_ERROR_SIZE bytes of the caller's. A `_scratch_` function returns a number of bytes.
//
// Letters: B images, N classes, H W a map's size, h w a layer's size, z y x the axes of a volume.
#ifndef CONTEXTRAST_H
#define CONTEXTRAST_H

#include <stdint.h>

#define CONTEXTRAST_API __attribute__((visibility("default")))

#define CONTEXTRAST_INTERFACE 4  // of this file: one more whenever a function here changes its arguments or results
#define CONTEXTRAST_MAX_SIDE 16384  // squared distances, and what the search along a line adds to them, stay below 2^31
#define CONTEXTRAST_MAX_VOXELS (INT64_C(1) << 31)  // of one image: a voxel's number in its image is an int32
#define CONTEXTRAST_MAX_SELECTION (INT64_C(1) << 29)  // pixels of an image of select_nearest, whatever its sides
#define CONTEXTRAST_MAX_CLASSES (1 << 20)  // of a selection, which counts the pixels of every class
#define CONTEXTRAST_MAX_LAYERS 16
#define CONTEXTRAST_ERROR_SIZE 256
#define CONTEXTRAST_NO_EDGE INT32_MAX  // squared distance where the class has no edge in its image
#define CONTEXTRAST_OUTSIDE (-1)       // distance of a pixel that belongs to no class

#ifdef __cplusplus
extern "C" {
#endif

enum { CONTEXTRAST_OK = 0, CONTEXTRAST_BAD_ARGUMENT = 1, CONTEXTRAST_DEVICE_FAILED = 2 };

typedef enum ContextrastType {
  CONTEXTRAST_UINT8,
  CONTEXTRAST_INT8,
  CONTEXTRAST_INT16,
  CONTEXTRAST_INT32,
  CONTEXTRAST_INT64,
  CONTEXTRAST_FLOAT16,
  CONTEXTRAST_BFLOAT16,
  CONTEXTRAST_FLOAT32,
  CONTEXTRAST_FLOAT64,
  CONTEXTRAST_UINT16,  // from here on: distances alone
  CONTEXTRAST_UINT32,
  CONTEXTRAST_UINT64
} ContextrastType;

// Where a selection looks for its distances: computed at the layer's own size, or at the labels' size and sampled.
typedef enum ContextrastDistanceAt { CONTEXTRAST_AT_LAYER, CONTEXTRAST_AT_FULL } ContextrastDistanceAt;

// The k errors nearest to their edge, or k errors drawn by hash alone.
typedef enum ContextrastNegatives { CONTEXTRAST_BANE, CONTEXTRAST_SEMI_HARD } ContextrastNegatives;

// CONTEXTRAST_INTERFACE as the library was built with, for callers that may find an older or newer one.
CONTEXTRAST_API int contextrast_interface(void);

// Integer maps (B, H, W), with channels = 0; or logits (B, channels, H, W) of a floating type, standing for the map of
// their arg-max over the channels (ties: the lowest; NaN counts as the largest, as in torch.argmax). Element (b, n, r,
// c) lies b*stride_batch + n*stride_channel + r*stride_row + c*stride_column elements behind data.
typedef struct ContextrastMap {
  const void *data;
  int64_t batch, channels, height, width;
  int64_t stride_batch, stride_channel, stride_row, stride_column;
  int32_t type;  // ContextrastType
} ContextrastMap;

// One layer of bane_negatives: its size, and where its negatives (B, height, width) go.
typedef struct ContextrastLayer {
  int64_t height, width;
  void *negatives;
} ContextrastLayer;

// Eq. 6. errors (B, H, W), sized as the labels: the predicted class where the pixel is valid and the prediction,
// brought to the labels' size, is another class; else -1. Valid: 0 <= label < num_classes and label != ignore_index. A
// prediction outside 0..num_classes-1 or equal to ignore_index is no error. num_classes = -1: the channels of the
// logits; for a class map every value from 0 to INT32_MAX is a class.
CONTEXTRAST_API int contextrast_error_map_cpu(const ContextrastMap *predictions, const ContextrastMap *labels,
                                              int64_t num_classes, int64_t ignore_index, int32_t *errors, int threads,
                                              char *error);
CONTEXTRAST_API int contextrast_error_map_cuda(const ContextrastMap *predictions, const ContextrastMap *labels,
                                               int64_t num_classes, int64_t ignore_index, int32_t *errors, int device,
                                               void *stream, char *error);

// A batch of volumes (B, size[0], size[1], size[2]) whose axes are called z, y and x. A map has size[0] = 1, a line has
// size[0] = size[1] = 1. Element (b, z, y, x) lies b*stride_batch + z*stride[0] + y*stride[1] + x*stride[2] elements
// behind data.
typedef struct ContextrastVolume {
  const void *data;
  int64_t batch, size[3];
  int64_t stride_batch, stride[3];
  int32_t type;  // ContextrastType
} ContextrastVolume;

// What a distance function is asked for, and where it writes. Every output has the volume's size and is contiguous.
// The squared distance of two pixels that lie dz, dy and dx apart is dz² + dy² + dx², an int32, without sampling; with
// it ((sampling[0] dz)² + (sampling[1] dy)²) + (sampling[2] dx)², each operation rounded to double.
typedef struct ContextrastDistance {
  double sampling[3];   // the pixel's size along z, y and x, if `sampled`
  int32_t sampled;      // 0: sampling is not read
  int32_t squared;      // distance is float with 0; with 1 it is int32, or double if sampled
  void *distance;       // inf, or CONTEXTRAST_NO_EDGE in int32, where there is nothing to measure to
  int32_t *nearest[3];  // null, or the z, y and x of the nearest pixel that is measured to; -1 where there is none. Of
                        // pixels equally near, the first in memory: candidates are compared along z, then y, then x
} ContextrastDistance;

// Bytes of scratch of edge_distance (edges != 0) or distance_transform, below. Nothing is read or written behind the
// pointers in volume and wanted, but which of them are null matters.
CONTEXTRAST_API int64_t contextrast_distance_scratch_cpu(const ContextrastVolume *volume,
                                                         const ContextrastDistance *wanted, int edges, int threads);
CONTEXTRAST_API int64_t contextrast_distance_scratch_cuda(const ContextrastVolume *volume,
                                                          const ContextrastDistance *wanted, int edges);

// Eq. 7. Distance of every pixel with a class >= 0 to the nearest edge pixel of its class in its image: one with a
// neighbour (of 4 in a map, of 6 in a volume) inside the image of another value. Pixels of negative class:
// CONTEXTRAST_OUTSIDE. classes are of an integer type; nearest must be null.
CONTEXTRAST_API int contextrast_edge_distance_cpu(const ContextrastVolume *classes, const ContextrastDistance *wanted,
                                                  void *scratch, int threads, char *error);
CONTEXTRAST_API int contextrast_edge_distance_cuda(const ContextrastVolume *classes, const ContextrastDistance *wanted,
                                                   void *scratch, int device, void *stream, char *error);

// Distance of every nonzero pixel to the nearest zero of its image, 0 on zeros. mask is of any type; -0 is zero and NaN
// is not.
CONTEXTRAST_API int contextrast_distance_transform_cpu(const ContextrastVolume *mask, const ContextrastDistance *wanted,
                                                       void *scratch, int threads, char *error);
CONTEXTRAST_API int contextrast_distance_transform_cuda(const ContextrastVolume *mask,
                                                        const ContextrastDistance *wanted, void *scratch, int device,
                                                        void *stream, char *error);

// Marks, for each image and class, exactly k = ceil(ratio * pixels of the class) pixels: those of smallest distance_sq
// (int32, the size of classes), ties in the order of hash(*seed, 0, row*W + column). selected (B, H, W): 1 or 0.
// Classes are 0..num_classes-1. seed points to memory of the device that computes.
CONTEXTRAST_API int64_t contextrast_select_nearest_scratch_cpu(int64_t batch, int64_t height, int64_t width,
                                                               int64_t num_classes, int threads);
CONTEXTRAST_API int64_t contextrast_select_nearest_scratch_cuda(int64_t batch, int64_t height, int64_t width,
                                                                int64_t num_classes);
CONTEXTRAST_API int contextrast_select_nearest_cpu(const ContextrastMap *classes, const ContextrastMap *distance_sq,
                                                   double ratio, int64_t num_classes, const int64_t *seed,
                                                   uint8_t *selected, void *scratch, int threads, char *error);
CONTEXTRAST_API int contextrast_select_nearest_cuda(const ContextrastMap *classes, const ContextrastMap *distance_sq,
                                                    double ratio, int64_t num_classes, const int64_t *seed,
                                                    uint8_t *selected, void *scratch, int device, void *stream,
                                                    char *error);

// Eqs. 6 and 7 and the selection, for several layers at once. Row r of a layer of h rows samples row (r*H)/h of a map
// of H, columns likewise. distance_at = CONTEXTRAST_AT_LAYER: labels and predictions are each sampled from their own
// size to the layer, where errors and distances are computed. CONTEXTRAST_AT_FULL: both are computed at the labels'
// size and sampled. Each layer's negatives: the error class of the selected pixels; others have none, which is -1 in
// CONTEXTRAST_INT32, and the largest number in CONTEXTRAST_UINT8 and CONTEXTRAST_INT16, of which all classes must be
// smaller. errors (num_layers): the number of error pixels in each layer, left alone where the layer has no pixels. Of
// labels, the scratch functions read the sizes alone.
CONTEXTRAST_API int64_t contextrast_bane_negatives_scratch_cpu(const ContextrastMap *labels, int64_t num_classes,
                                                               const ContextrastLayer *layers, int num_layers,
                                                               int type, int distance_at, int threads);
CONTEXTRAST_API int64_t contextrast_bane_negatives_scratch_cuda(const ContextrastMap *labels, int64_t num_classes,
                                                                const ContextrastLayer *layers, int num_layers,
                                                                int type, int distance_at);
CONTEXTRAST_API int contextrast_bane_negatives_cpu(const ContextrastMap *predictions, const ContextrastMap *labels,
                                                   int64_t num_classes, int64_t ignore_index,
                                                   const ContextrastLayer *layers, int num_layers, int type,
                                                   int64_t *errors, double ratio, int negatives, int distance_at,
                                                   const int64_t *seed, void *scratch, int threads, char *error);
CONTEXTRAST_API int contextrast_bane_negatives_cuda(const ContextrastMap *predictions, const ContextrastMap *labels,
                                                    int64_t num_classes, int64_t ignore_index,
                                                    const ContextrastLayer *layers, int num_layers, int type,
                                                    int64_t *errors, double ratio, int negatives, int distance_at,
                                                    const int64_t *seed, void *scratch, int device, void *stream,
                                                    char *error);

// CONTEXTRAST_OK if the kernels in this library can run on the device, else why not. Only in a library with CUDA code.
CONTEXTRAST_API int contextrast_cuda_status(int device, char *error);

#ifdef __cplusplus
}
#endif
#endif
