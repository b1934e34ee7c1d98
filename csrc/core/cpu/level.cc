// The passes of one instruction set for one map type: compiled once per pair, with CBAM_LEVEL_* and
// CBAM_TYPE_* defined.
#if defined(CBAM_TYPE_F32)
#define CBAM_MAP_TABLE kMapFloat32
#elif defined(CBAM_TYPE_F16)
#define CBAM_MAP_TABLE kMapFloat16
#elif defined(CBAM_TYPE_BF16)
#define CBAM_MAP_TABLE kMapBFloat16
#elif defined(CBAM_TYPE_F64)
#define CBAM_MAP_TABLE kMapFloat64
#else
#error "compile with one of CBAM_TYPE_F32, CBAM_TYPE_F16, CBAM_TYPE_BF16, CBAM_TYPE_F64"
#endif

#include "core/cpu/map_passes.h"

#if defined(CBAM_TYPE_F32) || defined(CBAM_TYPE_F64)
#include "core/cpu/dense_passes.h"
#endif

namespace cbam_ops {
namespace cpu {
namespace CBAM_LEVEL {

#if defined(CBAM_TYPE_F32)
using MapType = float;
#elif defined(CBAM_TYPE_F16)
using MapType = Float16;
#elif defined(CBAM_TYPE_BF16)
using MapType = BFloat16;
#else
using MapType = double;
#endif
using ComputeType = ComputeOf<MapType>::A;

extern const MapPasses<ComputeType> CBAM_MAP_TABLE;
const MapPasses<ComputeType> CBAM_MAP_TABLE = {
    ChannelPool<MapType>,      SpatialPool<MapType>, Apply<MapType>, BackwardPositions<MapType>,
    BackwardChannels<MapType>, BackwardMap<MapType>, Mask<MapType>,  ToMapType<MapType>,
    ToComputeType<MapType>,
};

#if defined(CBAM_TYPE_F32) || defined(CBAM_TYPE_F64)
#if defined(CBAM_TYPE_F32)
#define CBAM_DENSE_TABLE kDenseFloat32
#else
#define CBAM_DENSE_TABLE kDenseFloat64
#endif
extern const DensePasses<ComputeType> CBAM_DENSE_TABLE;
const DensePasses<ComputeType> CBAM_DENSE_TABLE = {
    Simd<ComputeType>::kLanes,           Multiply<ComputeType>,
    DotProductsOf<ComputeType>,          Sigmoid<ComputeType>,
    SigmoidDerivative<ComputeType>,      ConvolveRows<ComputeType>,
    ConvolveRowsTransposed<ComputeType>, KernelGradient<ComputeType>,
};
#endif

}  // namespace CBAM_LEVEL
}  // namespace cpu
}  // namespace cbam_ops
