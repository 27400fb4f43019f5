//! Arguments of a call, and how functions take them.

use crate::error::{Error, Result};
use crate::value::{Text, Value};

#[derive(Default)]
pub(crate) struct CallArgs {
    pub(crate) positional: Vec<Value>,
    pub(crate) keywords: Vec<(Text, Value)>,
}

impl CallArgs {
    /// Values of the named parameters. The first `required` must be given.
    pub(crate) fn bind<const N: usize>(
        self,
        function: &str,
        names: [&str; N],
        required: usize,
    ) -> Result<[Option<Value>; N]> {
        let given = self.positional.len();
        if given > N {
            return Err(Error::runtime(format!("{function}() takes at most {N} arguments ({given} given)")));
        }
        let mut values = [const { None }; N];
        for (place, value) in values.iter_mut().zip(self.positional) {
            *place = Some(value);
        }
        for (name, value) in self.keywords {
            let Some(at) = names.iter().position(|other| **other == *name) else {
                let name = crate::error::excerpt(&name);
                return Err(Error::runtime(format!("{function}() got an unexpected keyword argument '{name}'")));
            };
            if values[at].replace(value).is_some() {
                let name = crate::error::excerpt(&name);
                return Err(Error::runtime(format!("{function}() got multiple values for argument '{name}'")));
            }
        }
        if let Some(at) = values[..required].iter().position(Option::is_none) {
            return Err(Error::runtime(format!("{function}() missing required argument '{}'", names[at])));
        }
        Ok(values)
    }

    /// The same for functions that take no names.
    pub(crate) fn positional<const N: usize>(self, function: &str, required: usize) -> Result<[Option<Value>; N]> {
        if let Some((name, _)) = self.keywords.first() {
            let name = crate::error::excerpt(name);
            return Err(Error::runtime(format!("{function}() takes no keyword arguments ('{name}' given)")));
        }
        let given = self.positional.len();
        if given > N || given < required {
            return Err(Error::runtime(format!("{function}() takes {required} to {N} arguments ({given} given)")));
        }
        let mut values = [const { None }; N];
        for (place, value) in values.iter_mut().zip(self.positional) {
            *place = Some(value);
        }
        Ok(values)
    }
}
