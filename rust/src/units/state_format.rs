//! The formats of a record's state: which planes each has, in one table, [`StateFormat::spec`].
//!
//! A format is one of weights together with what an optimizer keeps for each of them. Files name it, and all
//! that depends on planes is asked of its row: extents, buffers, checksums, the blank state, what is trained.

use serde::{Deserialize, Serialize};

/// How one parameter lies in a plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// bfloat16.
    Bf16,
    /// IEEE single precision.
    F32,
    /// Two bytes with a sign.
    I16,
    /// One byte; of what, the store does not ask.
    U8,
    /// Two bytes, likewise.
    U16,
    /// Four bytes, likewise.
    U32,
}

impl Dtype {
    /// Bytes of one element.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::Bf16 | Self::I16 | Self::U16 => 2,
            Self::F32 | Self::U32 => 4,
        }
    }

    /// Its name, as torch has it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bfloat16",
            Self::F32 => "float32",
            Self::I16 => "int16",
            Self::U8 => "uint8",
            Self::U16 => "uint16",
            Self::U32 => "uint32",
        }
    }
}

/// One kind of state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Plane {
    /// What forward and backward compute with.
    Weight,
    /// Lower half of the fp32 master whose upper half the weight is; the first of the update's planes, so that an
    /// import need write no other.
    Remainder,
    /// First moment.
    ExpAvg,
    /// Second moment.
    ExpAvgSq,
}

impl Plane {
    /// The plane's name in messages and on disk.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Weight => "weight",
            Self::Remainder => "remainder",
            Self::ExpAvg => "exp_avg",
            Self::ExpAvgSq => "exp_avg_sq",
        }
    }
}

/// A plane of one format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlaneSpec {
    /// Which.
    pub plane: Plane,
    /// Of its elements, one for each parameter.
    pub dtype: Dtype,
}

impl PlaneSpec {
    const fn new(plane: Plane, dtype: Dtype) -> Self {
        Self { plane, dtype }
    }

    /// Bytes a parameter.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.dtype.bytes()
    }
}

/// What an optimizer keeps from step to step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptimizerFormat {
    /// `AdamW`'s two moments, f32.
    AdamW,
}

/// The row of one format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FormatSpec {
    /// What manifests call it.
    pub name: &'static str,
    /// The optimizer that updates such records; `None`: they are not trained.
    pub optimizer: Option<OptimizerFormat>,
    /// Planes by group, in the order in which they lie in its extent. Blank state is zero in all of them.
    planes: [&'static [PlaneSpec]; 2],
}

impl FormatSpec {
    const fn frozen(name: &'static str, weight: &'static [PlaneSpec]) -> Self {
        Self { name, optimizer: None, planes: [weight, &[]] }
    }

    /// The planes of one group.
    #[must_use]
    pub const fn planes(&self, group: Group) -> &'static [PlaneSpec] {
        self.planes[group as usize]
    }

    /// Bytes a parameter of one group.
    #[must_use]
    pub const fn group_bytes(&self, group: Group) -> usize {
        let (planes, mut bytes, mut index) = (self.planes(group), 0, 0);
        while index < planes.len() {
            bytes += planes[index].bytes();
            index += 1;
        }
        bytes
    }

    /// Bytes a parameter that a step of training reads and that it writes, where nothing stays in RAM:
    /// forward and backward read the weights, the update reads all other planes and writes everything.
    #[must_use]
    pub const fn step_bytes(&self) -> (usize, usize) {
        let (weight, update) = (self.group_bytes(Group::Weight), self.group_bytes(Group::Update));
        (2 * weight + update, if self.optimizer.is_some() { weight + update } else { 0 })
    }
}

const WEIGHT_BF16: PlaneSpec = PlaneSpec::new(Plane::Weight, Dtype::Bf16);
const WEIGHT_F32: PlaneSpec = PlaneSpec::new(Plane::Weight, Dtype::F32);
const REMAINDER: PlaneSpec = PlaneSpec::new(Plane::Remainder, Dtype::I16);
const EXP_AVG: PlaneSpec = PlaneSpec::new(Plane::ExpAvg, Dtype::F32);
const EXP_AVG_SQ: PlaneSpec = PlaneSpec::new(Plane::ExpAvgSq, Dtype::F32);

/// All formats, in the order of [`StateFormat`]. Another optimizer adds a row for each format of weights that
/// it updates.
static TABLE: [FormatSpec; 5] = [
    FormatSpec {
        name: "bf16",
        optimizer: Some(OptimizerFormat::AdamW),
        planes: [&[WEIGHT_BF16], &[REMAINDER, EXP_AVG, EXP_AVG_SQ]],
    },
    FormatSpec {
        name: "f32",
        optimizer: Some(OptimizerFormat::AdamW),
        planes: [&[WEIGHT_F32], &[EXP_AVG, EXP_AVG_SQ]],
    },
    FormatSpec::frozen("raw8", &[PlaneSpec::new(Plane::Weight, Dtype::U8)]),
    FormatSpec::frozen("raw16", &[PlaneSpec::new(Plane::Weight, Dtype::U16)]),
    FormatSpec::frozen("raw32", &[PlaneSpec::new(Plane::Weight, Dtype::U32)]),
];

/// How the state of a record's parameters is stored. The names are part of the file format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StateFormat {
    /// Trained by `AdamW`, computed in bf16: the weight is the upper half of an fp32 master.
    Bf16,
    /// Trained by `AdamW`, computed in fp32.
    F32,
    /// Not trained, 1 byte an element.
    Raw8,
    /// Not trained, 2 bytes an element (bf16, fp16).
    Raw16,
    /// Not trained, 4 bytes an element.
    Raw32,
}

impl StateFormat {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Bf16, Self::F32, Self::Raw8, Self::Raw16, Self::Raw32];

    /// Its row of the table.
    #[must_use]
    pub const fn spec(self) -> &'static FormatSpec {
        &TABLE[self as usize]
    }

    /// How one weight lies on disk and in RAM.
    #[must_use]
    pub const fn weight_dtype(self) -> Dtype {
        self.spec().planes(Group::Weight)[0].dtype
    }

    /// Bytes of one parameter's weight.
    #[must_use]
    pub const fn weight_bytes(self) -> usize {
        self.group_bytes(Group::Weight)
    }

    /// The planes of one group, in the order in which they lie in its extent: one for the weights; for the
    /// update, none where the record is not trained.
    #[must_use]
    pub const fn planes(self, group: Group) -> &'static [PlaneSpec] {
        self.spec().planes(group)
    }

    /// Bytes a parameter of one plane group.
    #[must_use]
    pub const fn group_bytes(self, group: Group) -> usize {
        self.spec().group_bytes(group)
    }

    /// Whether the record is trained (has update planes and two copies on disk).
    #[must_use]
    pub const fn is_trainable(self) -> bool {
        self.spec().optimizer.is_some()
    }
}

/// What is moved together: the weight alone, or all that only the update needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Group {
    /// The `weight` plane: read by forward and backward.
    Weight,
    /// All other planes: read by the update.
    Update,
}

impl Group {
    /// Both groups, in table order.
    pub const ALL: [Self; 2] = [Self::Weight, Self::Update];

    /// Position in tables and checksums; part of the file format.
    #[must_use]
    pub fn index(self) -> u8 {
        match self {
            Self::Weight => 0,
            Self::Update => 1,
        }
    }

    /// The group's name in messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Weight => "weight",
            Self::Update => "update",
        }
    }
}

#[cfg(test)]
mod tests;
