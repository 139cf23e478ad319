// Umbrella header of the public API.
#pragma once

#include "snapmla/backend.h"
#include "snapmla/dtype.h"
#include "snapmla/engine.h"
#include "snapmla/error.h"
#include "snapmla/kv_cache.h"
#include "snapmla/kv_rounding.h"
#include "snapmla/mla.h"
#include "snapmla/model_config.h"
#include "snapmla/tensor.h"

#define SNAPMLA_VERSION "0.1.0"
