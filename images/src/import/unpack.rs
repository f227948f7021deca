//! Reads an archive's frames and fills files in a scratch directory with its parts.
//! Invariant: never more is written than the manifest states; a file is as long as its part, its hash has been compared, and
//! holes are holes; memory is bounded whatever the archive claims.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use crate::archive::{BLOCK, Extents, Frame, HEAD_BYTES, Head, MAX_EXTENT_BYTES, WINDOW_LOG, is_zero};
use crate::error::ImageError;
use crate::manifest::Manifest;
use crate::transfer::{TransferPart, TransferProgress, TransferWatch};

/// What is left free on the disk, in bytes: it is not for an archive to fill it.
const RESERVE_BYTES: u64 = 256 * 1024 * 1024;
/// How much is written between two checks of the free space.
const SPACE_CHECK_BYTES: u64 = 16 * 1024 * 1024;

/// An archive that is being read.
pub struct Archive<'a, 'watch> {
    decoder: zstd::Decoder<'static, BufReader<&'a mut dyn Read>>,
    watch: &'a mut TransferWatch<'watch>,
    scratch: &'a Path,
    extent: Vec<u8>,
    /// Bytes that may be written until the disk is looked at again.
    unseen: u64,
    stage: TransferProgress,
}

pub fn refused(reason: impl Into<String>) -> ImageError {
    ImageError::ArchiveRefused { reason: reason.into() }
}

impl<'a, 'watch> Archive<'a, 'watch> {
    /// An archive out of `source`; its parts will go to `scratch`.
    pub fn new(
        source: &'a mut dyn Read,
        scratch: &'a Path,
        watch: &'a mut TransferWatch<'watch>,
    ) -> Result<Self, ImageError> {
        let decoder = zstd::Decoder::new(source).and_then(|mut decoder| {
            decoder.window_log_max(WINDOW_LOG)?;
            Ok(decoder.single_frame())
        });
        let decoder = decoder.map_err(|error| watch.failed("read", Path::new("the archive"), error))?;
        let stage = TransferProgress { stage: "manifest", index: 0, total: 0, bytes: 0, total_bytes: 0 };
        Ok(Self { decoder, watch, scratch, extent: Vec::new(), unseen: 0, stage })
    }

    /// The manifest, which comes first.
    pub fn manifest(&mut self) -> Result<Manifest, ImageError> {
        let mut head = [0; HEAD_BYTES];
        self.fill(&mut head)?;
        let head = Head::decode(&head).map_err(refused)?;
        let mut json = vec![0; head.manifest_bytes as usize];
        self.fill(&mut json)?;
        if Head::of(&json) != head {
            return Err(refused("its manifest does not match its hash"));
        }
        Manifest::parse(&json).map_err(|reason| refused(format!("its manifest cannot be read: {reason}")))
    }

    /// All parts in their order, into files of the scratch directory that are named by their hashes; then nothing more may
    /// come.
    pub fn parts(&mut self, pieces: &[TransferPart]) -> Result<(), ImageError> {
        self.stage.total = pieces.len() + 1;
        self.stage.total_bytes = pieces.iter().map(|piece| piece.part.bytes).sum();
        for (index, piece) in pieces.iter().enumerate() {
            self.stage.index = index + 1;
            self.stage.stage = piece.name;
            match self.frame()? {
                Frame::Part { sha256, bytes }
                    if nido_api::hex::encode(&sha256) == piece.part.sha256 && bytes == piece.part.bytes =>
                {
                    self.part(piece)?;
                }
                other => return Err(refused(unexpected(&other, index, pieces))),
            }
        }
        match self.frame()? {
            Frame::End => self.end(),
            other => Err(refused(unexpected(&other, pieces.len(), pieces))),
        }
    }

    /// Reports that the parts are being published; the last moment to stop.
    pub fn publishing(&mut self) -> Result<(), ImageError> {
        self.watch.check()?;
        self.stage.stage = "publish";
        self.stage.index = self.stage.total;
        self.report(self.stage.bytes);
        Ok(())
    }

    fn part(&mut self, piece: &TransferPart) -> Result<(), ImageError> {
        let path = self.scratch.join(&piece.part.sha256);
        let failed = |error| ImageError::io("write", &path, error);
        let mut file = File::options().read(true).write(true).create_new(true).open(&path).map_err(failed)?;
        file.set_len(piece.part.bytes).map_err(failed)?;
        let before = self.stage.bytes;
        self.report(before);
        let mut extents = Extents::of(piece.part.bytes);
        loop {
            match self.frame()? {
                Frame::Extent { offset, length } => {
                    extents.admit(offset, length).map_err(refused)?;
                    self.extent(&file, &path, offset, length)?;
                    self.report(before + offset + u64::from(length));
                }
                Frame::PartEnd => break,
                other => return Err(refused(format!("{} is inside its {}", other.describe(), piece.name))),
            }
        }
        file.rewind().map_err(failed)?;
        let hash = self.watch.hash(&file, piece.digest).map_err(|error| self.watch.failed("read", &path, error))?;
        if hash != piece.part.sha256 {
            return Err(refused(format!("the content of its {} does not match its hash", piece.name)));
        }
        // Here, so that it does not take long while the store is locked.
        file.sync_all().map_err(failed)?;
        self.report(before + piece.part.bytes);
        Ok(())
    }

    fn extent(&mut self, file: &File, path: &Path, offset: u64, length: u32) -> Result<(), ImageError> {
        let length = length.min(MAX_EXTENT_BYTES) as usize;
        let mut content = std::mem::take(&mut self.extent);
        content.resize(length, 0);
        self.fill(&mut content)?;
        if content.chunks(usize::try_from(BLOCK).unwrap_or(usize::MAX)).any(is_zero) {
            return Err(refused("it contains zeros instead of a hole"));
        }
        self.check_disk_space(length as u64)?;
        file.write_all_at(&content, offset).map_err(|error| ImageError::io("write", path, error))?;
        self.extent = content;
        Ok(())
    }

    /// Refuses to fill the disk to its brim.
    fn check_disk_space(&mut self, wanted: u64) -> Result<(), ImageError> {
        if self.unseen < wanted {
            let found = rustix::fs::statvfs(self.scratch);
            let found = found.map_err(|error| ImageError::io("look at", self.scratch, error.into()))?;
            if found.f_bavail.saturating_mul(found.f_frsize) < RESERVE_BYTES.saturating_add(SPACE_CHECK_BYTES) {
                return Err(ImageError::DiskFull { path: self.scratch.to_owned() });
            }
            self.unseen = SPACE_CHECK_BYTES;
        }
        self.unseen -= wanted;
        Ok(())
    }

    fn frame(&mut self) -> Result<Frame, ImageError> {
        let mut bytes = [0; 64];
        self.fill(&mut bytes[..1])?;
        let tag = bytes[0];
        let body = &mut bytes[1..=Frame::body_bytes(tag).map_err(refused)?];
        self.fill(body)?;
        Frame::decode(tag, body).map_err(refused)
    }

    /// Nothing may follow: neither in the compressed stream, whose checksum is compared here, nor behind it.
    fn end(&mut self) -> Result<(), ImageError> {
        let mut more = [0; 1];
        let inside = self.decoder.read(&mut more).map_err(|error| self.broken(&error))?;
        let behind = match inside {
            0 => self.decoder.get_mut().read(&mut more).map_err(|error| self.broken(&error))?,
            more => more,
        };
        if behind > 0 { Err(refused("data after its end")) } else { Ok(()) }
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), ImageError> {
        self.watch.check()?;
        self.decoder.read_exact(bytes).map_err(|error| self.broken(&error))
    }

    /// What it means that reading failed: that it is to stop, or that the source or the archive is broken.
    fn broken(&self, error: &io::Error) -> ImageError {
        let reason = match (error.kind(), error.raw_os_error()) {
            (io::ErrorKind::UnexpectedEof, _) => "it is truncated".to_owned(),
            (_, Some(number)) => {
                let error = io::Error::from_raw_os_error(number);
                return self.watch.failed("read", Path::new("the archive"), error);
            }
            _ => format!("its compressed data is damaged ({})", crate::progress::printable(&error.to_string())),
        };
        self.watch.check().err().unwrap_or_else(|| refused(reason))
    }

    fn report(&mut self, bytes: u64) {
        self.stage.bytes = bytes;
        (self.watch.progress)(self.stage.clone());
    }
}

/// Describes the error for a frame where a part, or the end, belongs. Pure.
fn unexpected(frame: &Frame, index: usize, pieces: &[TransferPart]) -> String {
    let position = |hash: &str| pieces.iter().position(|piece| piece.part.sha256 == hash);
    match frame {
        Frame::Part { sha256, .. } => match position(&nido_api::hex::encode(sha256)) {
            Some(at) if at < index => format!("its {} is contained twice", pieces[at].name),
            Some(at) if at == index => format!("its {} does not have the length in its manifest", pieces[at].name),
            Some(at) => format!("its {} comes too early", pieces[at].name),
            None => format!("{} is not named in its manifest", frame.describe()),
        },
        Frame::End => pieces.get(index).map_or_else(String::new, |piece| format!("its {} is missing", piece.name)),
        other => format!("unexpected {}", other.describe()),
    }
}
