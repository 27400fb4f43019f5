//! The backend on an Apple GPU: decode steps by metal-ext's fused kernels where they cover the stage, everything else by
//! [`CandleBackend`].
//!
//! Both work on the same weights and on the same KV cache, F16 (num_key_value_heads, capacity, head_dim) tensors of one
//! sequence and layer each, so a sequence may change from one to the other at any step. The fused path takes a step of one
//! row of each of up to eight sequences. It encodes the whole step into candle's command encoder without waiting, over
//! buffers that stay. What comes back is a few words where the most likely tokens are enough, and logits elsewhere.

use std::cell::RefCell;
use std::sync::Arc;

use candle_core::op::BackpropOp;
use candle_core::{DType, Device, MetalStorage, Storage, Tensor};
use metal_ext::decode::{self, Candidates, KvCache, Row, RowCandidates, Scratch};
use metal_ext::gemv::MOST_ROWS;
use metal_ext::metal::{Buffer, Compile, autoreleasepool};
use metal_ext::{Encoder, MetalExtOptions, Region};

use super::candle::metal_matrix::{Kernels, buffer_of};
use super::candle::{CandleBackend, CandleBuild, DeviceMatrix, TensorKv};
use super::fused::{self, FusedBuffers};
use super::{MicroBatch, Prediction, SequenceId, StageBackend, StageBytes, StageOutput, StageSource, Wanted};
use crate::error::{Error, Result};
use crate::instrument::{HiddenRow, Watch};

/// A run of decoder layers on an Apple GPU.
pub struct MetalBackend {
    candle: CandleBackend,
    source: StageSource,
    fused: Option<Fused>,
}

/// What the fused step works with.
struct Fused {
    stage: decode::FusedStage<Buffer>,
    scratch: Scratch<Buffer>,
    kernels: Kernels,
    options: MetalExtOptions,
    candidates: Candidates<Buffer>,
    /// Tokens of a row that can be looked for; 0 where logits are not the head's product as it is.
    most_candidates: usize,
    /// Whose buffers the stage and the scratch name.
    _kept: Vec<Tensor>,
}

impl MetalBackend {
    /// Loads a stage tensor by tensor; `progress` hears of bytes as they arrive.
    pub fn load(source: &StageSource, progress: &dyn Fn(u64)) -> Result<Self> {
        let candle = CandleBackend::load(source, progress)?;
        let fused = match source.options.metal.fused {
            false => None,
            true => match Fused::new(source, &candle)? {
                Ok(fused) => Some(fused),
                Err(why) => {
                    let layers = &source.layers;
                    tracing::info!("layers {layers:?} on {} decode with candle's kernels: {why}", source.device.spec);
                    None
                }
            },
        };
        Ok(MetalBackend { candle, source: source.clone(), fused })
    }
}

impl Fused {
    /// The stage in the fused step's terms; the inner error says what it does not cover.
    fn new(source: &StageSource, candle: &CandleBackend) -> Result<metal_ext::Result<Fused>> {
        let device = &source.device.device;
        let Some(kernels) = Kernels::of(device, source.options.metal) else {
            return Ok(Err(metal_ext::Error::unsupported("fused decode", "the device is not on Metal")));
        };
        let buffers = TensorBuffers { device, kept: RefCell::default() };
        let stage = match fused::stage(&source.config, source.layers.start, candle.weights(), &buffers) {
            Ok(stage) => stage,
            Err(why) => return Ok(Err(why)),
        };
        let bytes = stage.scratch_bytes(MOST_ROWS);
        let zeros = |bytes: usize| buffers.keep(Tensor::zeros(bytes.div_ceil(4), DType::F32, device)?);
        let vocab_size = stage.head.as_ref().map_or(0, |head| head.projection.layout.n);
        let most_candidates = match fused::logits_are_the_product(&source.config) {
            true => decode::most_candidates(vocab_size),
            false => 0,
        };
        let found = Candidates::<Buffer>::bytes(vocab_size);
        let candidates = Candidates { found: zeros(found.found)?, scratch: zeros(found.scratch.max(8))? };
        let scratch = Scratch {
            qkv: zeros(bytes.qkv)?,
            mixed: zeros(bytes.mixed)?,
            gated: zeros(bytes.gated)?,
            branch: zeros(bytes.branch)?,
            partials: zeros(bytes.partials)?,
            logits: zeros(bytes.logits)?,
        };
        let options = source.options.metal;
        let kept = buffers.kept.into_inner();
        let fused = Fused { stage, scratch, kernels, options, candidates, most_candidates, _kept: kept };
        fused.compile()?;
        Ok(Ok(fused))
    }

    /// Compiles every kernel that steps of this stage use.
    fn compile(&self) -> Result<()> {
        let Scratch { branch: any, .. } = &self.scratch;
        let angles = || [Region::at(any, 0), Region::at(any, 0)];
        for rows in 1..=MOST_ROWS {
            for position in decode::POSITIONS {
                let kv = KvCache { keys: any.clone(), values: any.clone(), capacity: position + 1 };
                let kv = vec![kv; self.stage.layers.len()];
                let row = || Row { position, kv: &kv, global_angles: angles(), local_angles: Some(angles()) };
                let rows: Vec<Row<Buffer>> = (0..rows).map(|_| row()).collect();
                let wanted: Vec<usize> = (0..rows.len()).collect();
                let mut pipelines = self.kernels.pipelines();
                let mut compile = Compile(&mut pipelines);
                self.stage.encode(&mut compile, any, &rows, &wanted, &self.scratch, &self.options).map_err(gpu)?;
            }
        }
        if self.most_candidates > 0 {
            let mut pipelines = self.kernels.pipelines();
            self.look_for(&mut Compile(&mut pipelines), &[0], 1).map_err(gpu)?;
        }
        Ok(())
    }

    /// Encodes the search for the `k` most likely tokens of rows of logits.
    fn look_for<E: Encoder<Buffer = Buffer>>(
        &self,
        encoder: &mut E,
        rows: &[usize],
        k: usize,
    ) -> metal_ext::Result<()> {
        match &self.stage.head {
            Some(head) if k > 0 => {
                let vocab_size = head.projection.layout.n;
                self.candidates.encode(encoder, &self.scratch.logits, vocab_size, rows, k)
            }
            _ => Ok(()),
        }
    }

    /// What [`look_for`](Self::look_for) has found, read back: those words and no more.
    fn found(&self, rows: usize, k: usize) -> Result<Vec<Option<RowCandidates>>> {
        if rows == 0 {
            return Ok(Vec::new());
        }
        let words = self.beginning(&self.candidates.found, (1, decode::found_words(rows, k)), DType::U32);
        Ok(decode::read_candidates(&words.flatten_all()?.to_vec1()?, rows, k))
    }

    /// The first values of a buffer: candle copies the whole of a tensor to the host, whatever part is asked for.
    fn beginning(&self, buffer: &Buffer, (rows, width): (usize, usize), dtype: DType) -> Tensor {
        let device = self.kernels.device().clone();
        let storage = MetalStorage::new(Arc::new(buffer.clone()), device, rows * width, dtype);
        Tensor::from_storage(Storage::Metal(storage), (rows, width), BackpropOp::none(), false)
    }

    /// A step of one row of each sequence; `kv` holds theirs.
    fn step(
        &self,
        source: &StageSource,
        batch: &MicroBatch,
        x: Tensor, // (rows, hidden_size), f32, of nobody else
        kv: &[&TensorKv],
    ) -> Result<StageOutput> {
        let mut kept = Vec::new();
        let mut angles = |rope: &crate::model::rope::RopeCache, position, length| -> Result<[(Buffer, usize); 2]> {
            let (cos, sin) = rope.cos_sin(position, 1, length)?;
            let buffers = [buffer_of(&cos)?, buffer_of(&sin)?];
            kept.extend([cos, sin]);
            Ok(buffers)
        };
        let mut places = Vec::with_capacity(kv.len());
        for (slice, kv) in batch.slices.iter().zip(kv) {
            if slice.position >= kv.capacity() {
                let (position, capacity) = (slice.position + 1, kv.capacity());
                return Err(Error::Tensors(format!("position {position} is past the KV cache's {capacity}")));
            }
            let caches = (0..self.stage.layers.len())
                .map(|layer| {
                    let (keys, values) = kv.tensors(layer);
                    Ok(KvCache { keys: buffer_of(keys)?.0, values: buffer_of(values)?.0, capacity: kv.capacity() })
                })
                .collect::<Result<Vec<_>>>()?;
            let global = angles(&source.ropes.global, slice.position, slice.length)?;
            let local = match &source.ropes.local {
                Some(local) => Some(angles(local, slice.position, slice.length)?),
                None => None,
            };
            places.push((slice.position, caches, global, local));
        }
        let rows: Vec<Row<Buffer>> = places
            .iter()
            .map(|(position, caches, global, local)| Row {
                position: *position,
                kv: caches,
                global_angles: global.each_ref().map(|(buffer, offset)| Region::at(buffer, *offset)),
                local_angles: local
                    .as_ref()
                    .map(|local| local.each_ref().map(|(buffer, offset)| Region::at(buffer, *offset))),
            })
            .collect();
        let wanted: Vec<usize> =
            batch.slices.iter().enumerate().filter(|(_, slice)| slice.is_predicted()).map(|(row, _)| row).collect();
        let searched: Vec<usize> = wanted.iter().copied().filter(|&row| self.enough(batch, row).is_some()).collect();
        let k = searched.iter().filter_map(|&row| self.enough(batch, row)).max().unwrap_or(0);
        let (buffer, _) = buffer_of(&x)?;
        self.kernels.encode(|encoder| {
            self.stage.encode(encoder, &buffer, &rows, &wanted, &self.scratch, &self.options)?;
            self.look_for(encoder, &searched, k)
        })?;
        let Some(head) = &self.stage.head else { return Ok(StageOutput::Activations(x)) };
        let mut best: Vec<Option<RowCandidates>> = vec![None; rows.len()];
        for (row, candidates) in searched.iter().zip(self.found(searched.len(), k)?) {
            best[*row] = candidates;
        }
        let logits = match wanted.iter().all(|&row| best[row].is_some()) {
            true => Vec::new(),
            false => {
                let n = head.projection.layout.n;
                let rows = self.beginning(&self.scratch.logits, (rows.len(), decode::stride(n)), DType::F32);
                rows.narrow(1, 0, n)?.to_vec2::<f32>()?
            }
        };
        let finished = |row: usize| fused::finish_logits(&source.config, logits[row].clone());
        if searched.is_empty() {
            return Ok(StageOutput::Logits(wanted.into_iter().map(finished).collect()));
        }
        let predicted = |row: usize| match (best[row].take(), self.enough(batch, row)) {
            (Some(mut tokens), Some(k)) => {
                tokens.truncate(k);
                Prediction::Best(tokens)
            }
            _ => Prediction::Logits(finished(row)),
        };
        Ok(StageOutput::Predictions(wanted.into_iter().map(predicted).collect()))
    }

    /// How many of the most likely tokens are enough for a row, if they can be looked for.
    fn enough(&self, batch: &MicroBatch, row: usize) -> Option<usize> {
        match batch.slices[row].wanted {
            Wanted::Best { k, .. } => (1..=self.most_candidates).contains(&k).then_some(k),
            Wanted::Nothing | Wanted::Logits { .. } => None,
        }
    }
}

fn gpu(error: metal_ext::Error) -> Error {
    Error::Tensors(error.to_string())
}

/// Makes the fused step's weights from the decoder's.
struct TensorBuffers<'a> {
    device: &'a Device,
    kept: RefCell<Vec<Tensor>>,
}

impl TensorBuffers<'_> {
    /// The tensor's buffer; the tensor stays.
    fn keep(&self, tensor: Tensor) -> Result<Buffer> {
        let (buffer, _) = buffer_of(&tensor)?;
        self.kept.borrow_mut().push(tensor);
        Ok(buffer)
    }
}

impl FusedBuffers<CandleBuild> for TensorBuffers<'_> {
    type Buffer = Buffer;

    fn matrix(&self, matrix: &DeviceMatrix) -> metal_ext::Result<decode::FusedMatrix<Buffer>> {
        match matrix {
            DeviceMatrix::Metal(matrix) => {
                matrix.packed().map_err(|e| metal_ext::Error::unsupported("fused decode", e.to_string()))
            }
            DeviceMatrix::Dense(tensor) => {
                let reason = format!("no kernel reads {} matrices", tensor.dtype().as_str());
                Err(metal_ext::Error::unsupported("fused decode", reason))
            }
            DeviceMatrix::Quantised { tensor, .. } => {
                let reason = format!("no kernel reads {:?} matrices", tensor.dtype());
                Err(metal_ext::Error::unsupported("fused decode", reason))
            }
            DeviceMatrix::Packed { .. } => {
                Err(metal_ext::Error::unsupported("fused decode", "the weights are on a CPU"))
            }
        }
    }

    fn floats(&self, vectors: &[&Tensor]) -> metal_ext::Result<Buffer> {
        let joined = || -> Result<Buffer> {
            let values = Tensor::cat(vectors, 0)?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
            self.keep(Tensor::from_vec(values.clone(), values.len(), self.device)?)
        };
        joined().map_err(|e| metal_ext::Error::unsupported("fused decode", e.to_string()))
    }
}

impl StageBackend for MetalBackend {
    fn open(&mut self, id: SequenceId, capacity: usize) -> Result<()> {
        self.candle.open(id, capacity)
    }

    fn fork(&mut self, from: SequenceId, to: SequenceId, len: usize, capacity: usize) -> Result<()> {
        self.candle.fork(from, to, len, capacity)
    }

    fn truncate(&mut self, id: SequenceId, length: usize) -> Result<()> {
        self.candle.truncate(id, length)
    }

    fn close(&mut self, id: SequenceId) {
        self.candle.close(id);
    }

    fn forward(&mut self, batch: &MicroBatch, input: Option<Tensor>, watch: &mut Watch) -> Result<StageOutput> {
        // What Metal hands out during a step is released at its end, not when the thread ends.
        autoreleasepool(|_| {
            let one_each = batch.slices.iter().all(|slice| slice.len == 1);
            let mut ids: Vec<SequenceId> = batch.slices.iter().map(|slice| slice.id).collect();
            ids.sort_unstable();
            ids.dedup();
            match &self.fused {
                // Who wants to see what is inside sees candle's steps, which round differently.
                Some(fused)
                    if !watch.looks_inside()
                        && one_each
                        && ids.len() == batch.slices.len()
                        && (1..=MOST_ROWS).contains(&ids.len()) =>
                {
                    let kv = batch.slices.iter().map(|slice| self.candle.sequence(slice.id));
                    let kv = kv.collect::<Result<Vec<_>>>()?;
                    let x = match input {
                        // A copy: the step works in place.
                        Some(input) => input.to_dtype(DType::F32)?.force_contiguous()?,
                        None => self.candle.embed(&batch.tokens)?,
                    };
                    fused.step(&self.source, batch, x, &kv)
                }
                _ => self.candle.forward(batch, input, watch),
            }
        })
    }

    fn lens(&mut self, rows: &[HiddenRow]) -> Result<Vec<Vec<f32>>> {
        self.candle.lens(rows)
    }

    fn bytes(&self) -> StageBytes {
        self.candle.bytes()
    }
}
